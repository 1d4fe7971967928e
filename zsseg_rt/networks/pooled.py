"""ViTs whose embedding is pooled by attention: PE-Core and SigLIP, over any :class:`Operations`.

The pool ends in a residual MLP, ``y = a + MLP(LN(a))``. With all attention on one patch x, a is
``W_o (W_v x + b_v) + b_o``, which is compared with text as it is (head ``value``) or after the MLP
(``value_mlp``); ``_own`` also leaves the attention of the last block out.

Source:
    Perception Encoder (perception_models 3e352cc); SigLIP 2 (big_vision 0127fb6, transformers
    5.24.0); TextRegion (e392cd2) for ``value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zsseg_rt.networks.clip import (
    ImageTower,
    Tensors,
    embed_patches,
    part_of,
    read_blocks,
    run_blocks,
)
from zsseg_rt.networks.heads import own_values
from zsseg_rt.networks.layers import Block, Turn, mlp, read_block, read_linear, read_norm, unit
from zsseg_rt.onnx.operations import Array, Linear, Operations, Value

HEADS = ("value_mlp", "value", "value_mlp_own", "value_own")
_POOL_HEADS = 8  # of PE-Core, whatever its width
_SIGLIP_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class PooledTower(ImageTower):
    """PE-Core's ViT, with a class token and rotary positions; or SigLIP's, with neither.

    ``tensors`` also have ``attn_pool.*``; SigLIP's no ``class_embedding``, ``ln_pre`` and ``proj``.
    """

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All residual blocks; PE-Core's queries and keys have even channels first in each head."""
        blocks = read_blocks(self.tensors, self.num_heads, self.activation, self.eps)
        if not self.extra_tokens:
            return blocks
        places = np.arange(len(blocks[0].query.weight)).reshape(self.num_heads, -1, 2)
        order = places.transpose(0, 2, 1).reshape(-1)
        return tuple(
            block._replace(query=_picked(block.query, order), key=_picked(block.key, order))
            for block in blocks
        )

    @cached_property
    def pool(self) -> Block:
        """The pool as a block: its norms are those before and after attention."""
        parts = part_of(self.tensors, "attn_pool.") | {
            f"ln_1.{key}": value for key, value in part_of(self.tensors, "ln_post.").items()
        }
        named = {f"pool.{key.replace('layernorm', 'ln_2')}": parts[key] for key in parts}
        num_heads = _POOL_HEADS if self.extra_tokens else self.num_heads
        return read_block(named, "pool", num_heads, self.activation, self.eps)

    @property
    def resizing(self) -> tuple[str, bool]:
        return "bilinear" if self.extra_tokens else "bicubic", False

    def turn(self, ops: Operations, grid_hw: tuple[int, int]) -> Turn | None:
        """PE-Core's rotation of queries and keys; None for SigLIP."""
        if not self.extra_tokens:
            return None
        width = len(self.blocks[0].query.weight) // self.num_heads
        rates = 10000.0 ** (-4 * np.arange(width // 4) / width)
        rows, columns = np.mgrid[1 : grid_hw[0] + 1, 1 : grid_hw[1] + 1].reshape(2, -1, 1)
        angles = np.concatenate([columns * rates, rows * rates], axis=1)
        angles = np.concatenate([np.zeros_like(angles[:1]), angles])
        cosines = np.tile(np.cos(angles), 2).astype(np.float32)
        sines = np.concatenate([-np.sin(angles), np.sin(angles)], axis=1).astype(np.float32)

        def turned(x: Value) -> Value:
            with ops.at("turn"):
                halves = [ops.slice(x, 3, width // 2, width), ops.slice(x, 3, 0, width // 2)]
                swapped = ops.mul(ops.concat(halves, 3), sines)
                return ops.add(ops.mul(x, cosines), swapped)

        return turned


def _picked(linear: Linear, rows: Array) -> Linear:
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def dense_embeds(
    ops: Operations, tower: PooledTower, image: Value, head: str = "value_mlp"
) -> Value:
    """Patch embeddings [B, N, D], unit norm, of an image [B, 3, H, W] of a fixed size."""
    own = head.endswith("_own")
    outputs = run_tower(ops, tower, image, tower.blocks[: -1 if own else None])
    first, count = tower.extra_tokens, outputs[-1].shape[1]
    with ops.at("last_block"):
        patches = ops.slice(outputs[-1], 1, first, count) if first else outputs[-1]
        patches = own_values(ops, patches, tower.blocks[-1]) if own else patches
        ops.mark("last_block", patches)
    pool = tower.pool
    (weight, bias), value = pool.out, pool.value
    assert value.bias is not None
    merged = Linear(weight @ value.weight, weight @ value.bias + bias)
    with ops.at("attn_pool"):
        norm, (merged,) = ops.fold_norm(tower.ln_post, (merged,))
        embeds = ops.linear(ops.mark("ln_post", ops.layer_norm(patches, norm)), merged)
        embeds = mlp(ops, embeds, pool) if head.startswith("value_mlp") else embeds
    return ops.mark("patch_embeds", unit(ops, ops.mark("dense", projected(ops, tower, embeds))))


def run_tower(
    ops: Operations, tower: PooledTower, image: Value, blocks: Sequence[Block]
) -> list[Value]:
    """Tokens before these blocks and after each, [B, N, W]."""
    grid = tower.grid_hw(tuple(image.shape[2:]))
    if tower.extra_tokens:
        x = embed_patches(ops, tower, image)
    else:
        shifts = tower.positions(grid) + tower.tensors["conv1.bias"]
        with ops.at("conv1"):
            kernel = Linear(tower.tensors["conv1.weight"])
            cells = ops.conv(image, kernel, stride=tower.patch_size)
            cells = ops.reshape(cells, (image.shape[0], shifts.shape[1], shifts.shape[0]))
            x = ops.mark("embedded", ops.add(ops.transpose(cells, (0, 2, 1)), shifts))
    return [x, *run_blocks(ops, blocks, x, turn=tower.turn(ops, grid))]


def projected(ops: Operations, tower: PooledTower, x: Value) -> Value:
    """Into the joint space, which is the pool's own in SigLIP."""
    proj = tower.tensors.get("proj")
    return x if proj is None else ops.matmul(x, proj)


@dataclass(frozen=True, kw_only=True)
class SiglipText:
    """SigLIP's text transformer, without a mask: padding is text, and the last token is read."""

    # CLIP's, with text_projection.weight and .bias; the rows of token_embedding.weight may lie in a
    # file
    tensors: Tensors
    num_heads: int  # Attention heads
    activation: str = "gelu_tanh"

    @property
    def context_length(self) -> int:
        """Tokens per prompt; shorter ones are padded to exactly as many."""
        return len(self.tensors["positional_embedding"])

    @property
    def vocab_size(self) -> int:
        return int(self.tensors["token_embedding.weight"].shape[0])

    def embed(self, ops: Operations, token_embeds: Value) -> Value:
        """Embeddings [T, D], not normalised, of rows of the token table [T, L, W]."""
        tensors, (prompts, length, _) = self.tensors, token_embeds.shape
        x = ops.add(token_embeds, tensors["positional_embedding"])
        blocks = read_blocks(tensors, self.num_heads, self.activation, _SIGLIP_EPS)
        x = ops.slice(run_blocks(ops, blocks, x)[-1], 1, length - 1, length)
        with ops.at("ln_final"):
            x = ops.layer_norm(x, read_norm(tensors, "ln_final", _SIGLIP_EPS))
            embeds = ops.linear(x, read_linear(tensors, "text_projection"))
        return ops.reshape(embeds, (prompts, embeds.shape[2]))
