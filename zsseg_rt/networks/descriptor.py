"""ZegCLIP and CLIP-RC over any :class:`Operations`, from weights with the official keys.

What inference does not need is left out; what is constant is folded, exactly up to rounding:

- What blocks make of prompts is never used, so prompts are constant keys and values.
- CLIP-RC's cells start as constants, and a cell is projected before it is spread over the grid.
- ZegCLIP's mask is the mean over heads of the last layer's scaled scores, one product of the full
  width: of that layer, the keys are left, with its query and the norm before it folded into them.
- The first layer's query of ZegCLIP is part of the descriptor, see :func:`zegclip_descriptor`.
- CLIP-RC's mean over cells commutes with the last product, and is taken before it.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math

import numpy as np

from zsseg_rt.networks.clip import ImageTower, Tensors, embed_patches, project, projection
from zsseg_rt.networks.layers import (
    activate,
    attend_to,
    read_linear,
    read_norm,
    residual_block,
    resize_grid,
    unit,
)
from zsseg_rt.onnx.operations import Array, Linear, Norm, Operations, Value

BLOCKED = np.float32(-1e4)
"""Added to the scores of keys that a token must not see: its exponential is zero in every
precision, and it causes no NaN in blockwise attention kernels that meet only such keys."""

_OFFSET = 0.25  # small beside normalised values, whose rounding in float16 it must not spoil


class PromptedTower(ImageTower):
    """CLIP's ViT with prompts for each block; the class embedding counts twice."""

    @property
    def class_token(self) -> Array:
        return super().class_token + self.tensors["class_embedding"]

    @property
    def num_cells(self) -> int:
        """CLIP-RC's cell tokens R, a square number; 0 in ZegCLIP."""
        return len(self.tensors.get("region_level_bridge", ()))

    @property
    def resizing(self) -> tuple[str, bool]:
        return "bilinear", False

    def prompts(self) -> list[Array | None]:
        """The projected prompts of each block, float32 [1, P, W], or None."""
        shallow, deep = self.tensors["prompt_embeddings"], self.tensors["deep_prompt_embeddings"]
        weight, bias = read_linear(self.tensors, "prompt_proj")
        rows = np.concatenate([shallow, deep]) @ weight.T + bias
        parts: list[Array | None] = list(rows[:, None]) if rows.shape[1] else []
        return (parts + [None] * len(self.blocks))[: len(self.blocks)]


def image_encoder(ops: Operations, tower: PromptedTower, image: Value) -> tuple[Value, Value]:
    """ZegCLIP's ``patch_embeds`` [B, N, D] and ``cls_embed`` [B, D], unit norm."""
    x = _run_blocks(ops, tower, embed_patches(ops, tower, image))
    with ops.at("prompt_norm"):
        x = ops.layer_norm(x, read_norm(tower.tensors, "prompt_norm", 1e-6))
    embeds = project(ops, tower, x)
    batch, count, width = embeds.shape
    cls_embed = ops.reshape(ops.slice(embeds, 1, 0, 1), (batch, width))
    return ops.slice(embeds, 1, 1, count), cls_embed


def cell_encoder(
    ops: Operations, tower: PromptedTower, image: Value, lateral: Linear
) -> tuple[Value, Value]:
    """CLIP-RC's ``patch_embeds`` [1, N, E] and ``cls_embed`` [R, D] of one image.

    They are ``lateral`` of each patch's cell, class and patch embeddings, and the sums of each
    cell's and the image's; all embeddings are of unit norm.
    """
    tensors, cells = tower.tensors, tower.num_cells
    grid_hw = tower.grid_hw(tuple(image.shape[2:]))
    start = ops.layer_norm(tensors["region_level_bridge"][None], read_norm(tensors, "ln_pre"))
    x = ops.concat((embed_patches(ops, tower, image), start), 1)
    prompts = next((part.shape[1] for part in tower.prompts() if part is not None), 0)
    official = grid_hw == (tower.grid_side,) * 2  # as in the official code; others are cut evenly
    allowed = allowed_tokens(grid_hw, cells, official=official)
    allowed = np.concatenate([allowed, allowed[:, :1].repeat(prompts, 1)], 1)  # as the class token
    x = _run_blocks(ops, tower, x, np.where(allowed, np.float32(0), BLOCKED))
    others = x.shape[1] - cells
    with ops.at("prompt_norm"):
        seeing_all = ops.layer_norm(
            ops.slice(x, 1, 0, others), read_norm(tensors, "prompt_norm", 1e-6)
        )
    to_joint = projection(ops, tower)
    embeds, cell_embeds = (
        unit(ops, to_joint(tokens)) for tokens in (seeing_all, ops.slice(x, 1, others, x.shape[1]))
    )
    width = embeds.shape[2]
    cls_embed, patches = ops.slice(embeds, 1, 0, 1), ops.slice(embeds, 1, 1, others)
    of_cell, of_class, of_patch = (
        Linear(np.ascontiguousarray(part)) for part in np.split(lateral.weight, 3, axis=1)
    )
    with ops.at("lateral_proj"):
        spread = ops.matmul(spread_cells(cells, grid_hw), ops.linear(cell_embeds, of_cell))
        whole = ops.linear(cls_embed, Linear(of_class.weight, lateral.bias))
        patch_embeds = ops.add(ops.linear(patches, of_patch), ops.add(spread, whole))
    return patch_embeds, ops.reshape(ops.add(cell_embeds, cls_embed), (cells, width))


def _run_blocks(
    ops: Operations, tower: PromptedTower, x: Value, mask: Array | None = None
) -> Value:
    """Tokens after the last block; a mask's last columns are the prompts'."""
    for index, (block, prompts) in enumerate(zip(tower.blocks, tower.prompts(), strict=True)):
        keys = x.shape[1] + (0 if prompts is None else prompts.shape[1])
        with ops.at(f"blocks.{index}"):
            scores = None if mask is None else mask[:, :keys]
            x = ops.mark(f"blocks.{index}", residual_block(ops, x, block, scores, prompts))
    return x


def cells_of_patches(grid_hw: tuple[int, int], num_cells: int, *, official: bool = False) -> Array:
    """The cell that each patch lies in, int64 [N], of a square number R; R for one in no cell."""
    side = math.isqrt(num_cells)

    def cut(size: int) -> Array:
        places = np.arange(size)
        if not official:
            return places * side // size
        stride = size // side
        return np.where(places < side * stride, places // max(stride, 1), num_cells)

    rows, columns = (cut(size) for size in grid_hw)
    return np.asarray(np.minimum(rows[:, None] * side + columns, num_cells).reshape(-1))


def allowed_tokens(grid_hw: tuple[int, int], num_cells: int, *, official: bool = False) -> Array:
    """Which token sees which, bool [1 + N + R, 1 + N + R]: class, patches, cells.

    All but cells see each other. A cell and its patches do, and a cell sees itself.
    """
    cells = cells_of_patches(grid_hw, num_cells, official=official)
    inside = cells[:, None] == np.arange(num_cells)
    first = 1 + len(inside)
    allowed = np.zeros((first + num_cells, first + num_cells), bool)
    allowed[:first, :first] = True
    allowed[1:first, first:] = inside
    allowed[first:, 1:first] = inside.T
    allowed[first:, first:] = np.eye(num_cells, dtype=bool)
    return allowed


def spread_cells(num_cells: int, grid_hw: tuple[int, int]) -> Array:
    """How much each cell counts in each patch, bilinear, float32 [N, R]."""
    side = math.isqrt(num_cells)
    corners = np.eye(num_cells, dtype=np.float32).reshape(side, side, num_cells)
    return resize_grid(corners, grid_hw, "bilinear").reshape(-1, num_cells)


def zegclip_descriptor(head: Tensors, num_heads: int) -> tuple[Linear, float]:
    """ZegCLIP's descriptor [Q, 2 D] of ``[cls * text, text]``, and the factor of the last product.

    Of several layers it also has the first one's query, below the E rows of the queries: Q is 2 E.
    """
    layers = _layers(head, "decoder_1")
    weight, bias = read_linear(head, "q_proj")
    query = read_linear(head, f"{layers[0]}multihead_attn.q")
    width = len(weight)
    logit_scale = 1.0 / (num_heads * math.sqrt(width // num_heads))
    if len(layers) == 1:
        return Linear(weight, bias), logit_scale
    matrix = query.weight.astype(np.float64)
    below = matrix @ weight, matrix @ np.asarray(bias) + np.asarray(query.bias)
    weight, bias = (
        np.concatenate([own, part.astype(np.float32)])
        for own, part in zip((weight, np.asarray(bias)), below, strict=True)
    )
    return Linear(weight, bias), logit_scale


def decoder(
    ops: Operations, head: Tensors, num_heads: int, queries: Value, patch_embeds: Value
) -> tuple[Value, Value]:
    """ZegCLIP's ``class_embeds`` [B, C, E] and ``patch_keys`` [B, N, E].

    ``head`` are weights below ``decode_head.``; ``queries`` [B, C, Q] are the descriptor's.
    """
    *layers, last = _layers(head, "decoder_1")
    query, key = (read_linear(head, f"{last}multihead_attn.{part}") for part in "qk")
    width = len(query.weight)
    tokens = ops.slice(queries, 2, 0, width) if layers else ops.linear(queries, query)
    for index, layer in enumerate(layers):
        norm = read_norm(head, f"{layer}norm3")
        if index == len(layers) - 1:
            norm, key = _fold_query(norm, query, key)
        with ops.at(layer[:-1]):
            first = None if index else ops.slice(queries, 2, width, 2 * width)
            tokens = _refine(ops, head, layer, num_heads, (tokens, patch_embeds, first), norm)
    with ops.at(f"{last}multihead_attn.k"):
        return tokens, ops.linear(patch_embeds, key)


def two_way_decoder(
    ops: Operations, head: Tensors, num_heads: int, queries: Value, patch_embeds: Value
) -> tuple[Value, Value]:
    """CLIP-RC's ``class_embeds`` [1, C, E], means over the cells, and ``patch_keys`` [1, N, E].

    ``queries`` [R, C, E] are the descriptor's, ``patch_embeds`` those of :func:`cell_encoder`.
    """
    cells, classes, width = queries.shape
    rows = "queries" if isinstance(classes, str) else cells * classes
    tokens, patches = ops.reshape(queries, (1, rows, width)), patch_embeds
    sides = zip(_layers(head, "decoder_q"), _layers(head, "decoder_v"), strict=True)
    for query_layer, patch_layer in sides:
        refined = []
        for layer, pair in ((query_layer, (tokens, patches)), (patch_layer, (patches, tokens))):
            with ops.at(layer[:-1]):
                norm = read_norm(head, f"{layer}norm3")
                refined.append(_refine(ops, head, layer, num_heads, (*pair, None), norm))
        tokens, patches = refined
    by_cell = ops.reshape(tokens, (cells, classes, width))
    return ops.mean(by_cell, 0), patches


def _layers(head: Tensors, stack: str) -> list[str]:
    """Beginnings of the keys of a decoder's layers."""
    numbers = {int(key.split(".")[2]) for key in head if key.startswith(f"{stack}.layers.")}
    return [f"{stack}.layers.{number}." for number in sorted(numbers)]


def _refine(
    ops: Operations,
    head: Tensors,
    layer: str,
    num_heads: int,
    inputs: tuple[Value, Value, Value | None],
    norm: Norm,
) -> Value:
    """A decoder layer: tokens attend to a memory, then an MLP; ``inputs`` ends with the query."""
    tokens, memory, query = inputs
    parts = ("q", "k", "v", "proj")
    first, *others, proj = (read_linear(head, f"{layer}multihead_attn.{part}") for part in parts)
    with ops.at("multihead_attn"):
        linears = (first if query is None else None, *others)
        asking = tokens if query is None else query
        mixed = attend_to(ops, (asking, memory, memory), linears, proj, num_heads)
    tokens = ops.layer_norm(ops.add(tokens, mixed), read_norm(head, f"{layer}norm2"))
    hidden = activate(ops, ops.linear(tokens, read_linear(head, f"{layer}linear1")), "relu")
    update = ops.linear(hidden, read_linear(head, f"{layer}linear2"))
    return ops.layer_norm(ops.add(tokens, update), norm)


def _fold_query(norm: Norm, query: Linear, key: Linear) -> tuple[Norm, Linear]:
    """A norm and a key whose product equals ``query(norm(x)) @ key(y)``, for every x and y."""
    # Normalised rows n add up to 0, so with m = n + c a row of c stands for the constant 1:
    # sum(m) / (c E) = 1. With w = query.weight.T @ key(y), query(norm(x)) @ key(y) is
    # n @ (scale * w) + bias @ w + query.bias @ key(y), and all three are linear in key(y).
    scale, shift = (np.asarray(part, np.float64) for part in norm[:2])
    weight = query.weight.astype(np.float64).T
    constant = (shift - _OFFSET * scale) @ weight + np.asarray(query.bias)
    matrix = scale[:, None] * weight + constant / (_OFFSET * len(scale))
    folded = (matrix @ np.asarray(part) for part in key)
    flat = np.full(len(scale), _OFFSET, np.float32)
    return Norm(np.ones_like(flat), flat, norm.eps), Linear(
        *(part.astype(np.float32) for part in folded)
    )
