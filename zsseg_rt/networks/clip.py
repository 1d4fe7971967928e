"""CLIP's two towers over any :class:`Operations`, from weights with CLIP's own keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from zsseg_rt.networks.layers import (
    Block,
    Turn,
    read_block,
    read_norm,
    residual_block,
    resize_grid,
    unit,
)
from zsseg_rt.onnx.operations import Array, Linear, Norm, Operations, Value

Tensors = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """CLIP's ViT with a class token, and its relatives."""

    # conv1.weight, class_embedding, positional_embedding, ln_pre, transformer.resblocks.0...,
    # ln_post, proj; float32
    tensors: Tensors
    num_heads: int  # Attention heads
    activation: str  # The MLPs', "quick_gelu" or "gelu"
    patch_stride: int | None = None  # Pixels from one patch to the next; None is the patch size

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return read_blocks(self.tensors, self.num_heads, self.activation, self.eps)

    @property
    def eps(self) -> float:
        """Of all norms: CLIP's, or that of TIPS and SigLIP."""
        others = "register_embedding" in self.tensors or not self.extra_tokens
        return 1e-6 if others else 1e-5

    @property
    def extra_tokens(self) -> int:
        """How many stored positions stand before those of the patches: SigLIP has none."""
        return int("class_embedding" in self.tensors)

    @property
    def resizing(self) -> tuple[str, bool]:
        """How positions are resized: mode, and whether with antialiasing."""
        return "bicubic", False

    @property
    def patch_size(self) -> int:
        return int(self.tensors["conv1.weight"].shape[-1])

    @property
    def stride(self) -> int:
        return self.patch_stride or self.patch_size

    @property
    def class_token(self) -> Array:
        """The class token with its position, float32 [W]."""
        token: Array = self.tensors["class_embedding"] + self.tensors["positional_embedding"][0]
        return token

    @property
    def grid_side(self) -> int:
        """Side of the square grid that the positions are stored for."""
        return math.isqrt(len(self.tensors["positional_embedding"]) - self.extra_tokens)

    @property
    def ln_post(self) -> Norm:
        return read_norm(self.tensors, "ln_post", self.eps)

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return size_hw[0] // self.stride, size_hw[1] // self.stride

    def positions(self, grid_hw: tuple[int, int], *, as_published: bool = False) -> Array:
        """Positions of a grid's patches, float32 [gh * gw, W]; ``as_published`` as SCLIP does."""
        side, rows = self.grid_side, self.tensors["positional_embedding"][self.extra_tokens :]
        if grid_hw == (side, side) or (as_published and math.prod(grid_hw) == side**2):
            return rows
        mode, antialias = self.resizing
        beyond = 0.1 if as_published else 0.0
        cells = rows.reshape(side, side, -1)
        resized = resize_grid(cells, grid_hw, mode, antialias=antialias, beyond=beyond)
        return np.ascontiguousarray(resized.reshape(-1, rows.shape[1]))


def part_of(tensors: Tensors, prefix: str) -> dict[str, Array]:
    """The tensors of a part, by what follows its prefix in their keys."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def embed_patches(
    ops: Operations, tower: ImageTower, image: Value, positions: Array | None = None
) -> Value:
    """Class token and patches after ``ln_pre``, [B, 1 + N, W], of an image [B, 3, H, W]."""
    tensors, norm = tower.tensors, read_norm(tower.tensors, "ln_pre")
    grid = tower.grid_hw(tuple(image.shape[2:]))
    if positions is None:
        positions = tower.positions(grid)
    batch, width = image.shape[0], positions.shape[1]
    with ops.at("conv1"):
        pad = (tower.patch_size - tower.stride) // 2
        cells = ops.conv(image, Linear(tensors["conv1.weight"]), stride=tower.stride, pad=pad)
    cells = ops.reshape(cells, (batch, width, grid[0] * grid[1]))
    with ops.at("ln_pre"):
        patches = ops.layer_norm(ops.add(ops.transpose(cells, (0, 2, 1)), positions), norm)
        token = ops.repeat(ops.layer_norm(tower.class_token[None, None], norm), image)
    return ops.mark("ln_pre", ops.concat((token, patches), 1))


def run_blocks(
    ops: Operations,
    blocks: Sequence[Block],
    x: Value,
    mask: Value | None = None,
    turn: Turn | None = None,
) -> list[Value]:
    """Tokens after each block, each [B, N, W]."""
    outputs = []
    for index, block in enumerate(blocks):
        with ops.at(f"blocks.{index}"):
            x = ops.mark(f"blocks.{index}", residual_block(ops, x, block, mask, turn=turn))
        outputs.append(x)
    return outputs


def project(ops: Operations, tower: ImageTower, tokens: Value) -> Value:
    """Tokens [B, N, W] of the last block in the joint space, [B, N, D], unit norm."""
    return unit(ops, projection(ops, tower)(tokens))


def projection(ops: Operations, tower: ImageTower) -> Callable[[Value], Value]:
    """Into the joint space, not normalised, for several groups of tokens; they share weights."""
    norm, (proj,) = ops.fold_norm(tower.ln_post, (Linear(tower.tensors["proj"].T),))

    def embeds(tokens: Value) -> Value:
        with ops.at("ln_post"):
            normed = ops.layer_norm(tokens, norm)
        with ops.at("proj"):
            return ops.linear(normed, proj)

    return embeds


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """CLIP's text transformer."""

    # token_embedding.weight, positional_embedding, transformer.resblocks.0..., ln_final,
    # text_projection; float32
    tensors: Tensors
    num_heads: int  # Attention heads
    activation: str  # The MLPs', "quick_gelu" or "gelu"

    @property
    def context_length(self) -> int:
        return len(self.tensors["positional_embedding"])

    @property
    def vocab_size(self) -> int:
        return len(self.tensors["token_embedding.weight"])

    def embed(self, ops: Operations, token_ids: Value) -> Value:
        """Embeddings [T, D], not normalised, of ids int64 [T, L]: of the largest id, the end's."""
        tensors, length = self.tensors, token_ids.shape[1]
        with ops.at("token_embedding"):
            tokens = ops.gather(tensors["token_embedding.weight"], token_ids)
        x = ops.add(tokens, tensors["positional_embedding"][:length])
        mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        blocks = read_blocks(tensors, self.num_heads, self.activation)
        x = run_blocks(ops, blocks, x, mask)[-1]
        with ops.at("ln_final"):
            x = ops.layer_norm(x, read_norm(tensors, "ln_final"))
        # A product with zeros and a one instead of an index: the same row, without a gather.
        ends = ops.equal(np.arange(length), ops.arg_max(token_ids))
        one_hot = ops.reshape(ops.cast(ends, "float32"), (token_ids.shape[0], 1, length))
        width = x.shape[-1]
        row = ops.reshape(ops.matmul(one_hot, x), (token_ids.shape[0], width))
        return ops.matmul(row, tensors["text_projection"])


def read_blocks(
    tensors: Tensors, num_heads: int, activation: str, eps: float = 1e-5
) -> tuple[Block, ...]:
    """All residual blocks; ``eps`` is that of their norms."""
    prefix, names = "transformer.resblocks.", set()
    for key in tensors:
        if key.startswith(prefix):
            names.add(int(key.removeprefix(prefix).split(".")[0]))
    return tuple(
        read_block(tensors, f"{prefix}{index}", num_heads, activation, eps)
        for index in sorted(names)
    )


# --- dense heads ---


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A network up to its last block, as a dense head reads it."""

    tower: ImageTower
    grid_hw: tuple[int, int]
    # Tokens [B, 1 + N, W] before the first block and after each but the last
    outputs: Sequence[Value]
    # The head's settings
    options: Mapping[str, Any] = field(default_factory=dict)

    def after(self, block: int) -> Value:
        """Tokens after a block, counted from 0; -1 is the input of the first."""
        return self.outputs[block + 1]


Head = Callable[[Operations, Trunk], Value]
"""Makes the last block's patches [B, N, W], before ``ln_post``."""


def patches_of(ops: Operations, tokens: Value) -> Value:
    """Tokens without the class token."""
    return ops.slice(tokens, 1, 1, tokens.shape[1])
