"""TIPSv2's two towers over any :class:`Operations`, from weights that ``sort_tips`` sorted.

In the last block every patch keeps its own value, as with the head ``maskclip`` of CLIP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from zsseg_rt.networks.clip import ImageTower, Tensors, read_blocks, run_blocks
from zsseg_rt.networks.heads import own_values
from zsseg_rt.networks.layers import read_norm, residual_block, unit
from zsseg_rt.onnx.operations import Array, Linear, Operations, Value

CONTEXT_LENGTH = 64  # tokens per prompt
_FAR = np.float32(-1e9)  # its exponential is 0
EXTRA_TOKENS = 2
"""Before the patches: the class token and a register token, which has no position."""


class TipsImage(ImageTower):
    """DINOv2's ViT: no norm before the first block, no projection after the last."""

    @property
    def resizing(self) -> tuple[str, bool]:
        return "bilinear", True


def dense_embeds(ops: Operations, tower: TipsImage, image: Value) -> Value:
    """Patch embeddings [B, N, W], unit norm, of an image [B, 3, H, W] in [0, 1]."""
    x = _tokens(ops, tower, image)
    last = run_blocks(ops, tower.blocks[:-1], x)[-1]
    with ops.at("last_block"):
        patches = ops.slice(last, 1, EXTRA_TOKENS, last.shape[1])
        patches = ops.mark("last_block", own_values(ops, patches, tower.blocks[-1]))
    with ops.at("ln_post"):
        normed = ops.mark("ln_post", ops.layer_norm(patches, tower.ln_post))
    return ops.mark("patch_embeds", unit(ops, normed))


def class_embed(ops: Operations, tower: TipsImage) -> Value:
    """The class token [B, W] after the last norm, unit norm, after :func:`dense_embeds`."""
    last = ops.marks[f"blocks.{len(tower.blocks) - 2}"]
    token = residual_block(ops, last, tower.blocks[-1], num_queries=1)
    return unit(ops, ops.layer_norm(token, tower.ln_post))[:, 0]


def _tokens(ops: Operations, tower: TipsImage, image: Value) -> Value:
    """Class token, register and patches with their positions, [B, 2 + N, W]."""
    tensors, grid = tower.tensors, tower.grid_hw(tuple(image.shape[2:]))
    shifts = ops.add(tensors["conv1.bias"], tower.positions(grid))
    batch, (count, width) = image.shape[0], shifts.shape
    with ops.at("conv1"):
        cells = ops.conv(image, Linear(tensors["conv1.weight"]), stride=tower.patch_size)
        cells = ops.transpose(ops.reshape(cells, (batch, width, count)), (0, 2, 1))
        patches = ops.add(cells, shifts)
    first = tensors["class_embedding"] + tensors["positional_embedding"][0]
    extra = ops.concat((first[None, None], tensors["register_embedding"][None, None]), 1)
    return ops.mark("tokens", ops.concat((ops.repeat(extra, image), patches), 1))


@dataclass(frozen=True, kw_only=True)
class TipsText:
    """TIPS's text transformer: tokens see each other, their mean is the embedding."""

    tensors: Tensors  # token_embedding.weight, transformer.resblocks.0..., ln_final; float32
    num_heads: int  # Attention heads
    context_length: int = CONTEXT_LENGTH

    @property
    def vocab_size(self) -> int:
        """Rows of the token table; the id of this number marks padding."""
        return len(self.tensors["token_embedding.weight"])

    def embed(self, ops: Operations, token_ids: Value) -> Value:
        """Embeddings [T, W], not normalised, of token ids int64 [T, L]."""
        tensors, (prompts, length) = self.tensors, token_ids.shape
        table = tensors["token_embedding.weight"]
        width = table.shape[1]
        scaled = ops.mul(table, np.float32(math.sqrt(width)))
        rows = ops.concat((scaled, np.zeros((1, width), np.float32)), 0)  # of padding, the last
        with ops.at("token_embedding"):
            x = ops.add(ops.gather(rows, token_ids), sinusoids(length, width))
            padding = ops.cast(ops.equal(token_ids, np.array(self.vocab_size, np.int64)), "float32")
        mask = ops.reshape(ops.mul(padding, _FAR), (prompts, 1, 1, length))
        blocks = read_blocks(tensors, self.num_heads, "relu")
        x = run_blocks(ops, blocks, x, mask)[-1]
        with ops.at("ln_final"):
            x = ops.layer_norm(x, read_norm(tensors, "ln_final"))
        valid = ops.sub(np.ones(1, np.float32), padding)
        total = ops.matmul(ops.reshape(valid, (prompts, 1, length)), x)
        count = ops.add(ops.sum(valid, -1), np.float32(1e-8))
        return ops.div(ops.reshape(total, (prompts, width)), count)


def sinusoids(length: int, width: int) -> Array:
    """Positions of text tokens: all sines, then all cosines, float32 [length, width]."""
    half = width // 2
    rates = np.exp(np.arange(half) * -(math.log(10000.0) / max(half - 1, 1)))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
