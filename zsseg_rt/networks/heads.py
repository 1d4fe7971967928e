"""Dense heads over any :class:`Operations`: what CLIP's last block becomes for local patches.

With X the tokens before it (row 0 is the class token), q, k, v its projections of ``ln_1(X)``,
s = 1 / sqrt(head width), O its output projection and M(Z) = Z + mlp(ln_2(Z)):

========== ===================================== ==================
head       attention A                           last block's Z
========== ===================================== ==================
vanilla    softmax(q k^T s)                      M(X + O(A v))
maskclip   identity                              M(X + O(v))
sclip      softmax(q q^T s) + softmax(k k^T s)   M(X + O(A v))
clearclip  softmax(q q^T s)                      O(A v)
naclip     softmax(k k^T s + prior)              O(A v)
sfp        see :mod:`zsseg_rt.networks.aggregating`
sc_clip    see :mod:`zsseg_rt.networks.aggregating`
========== =========================================================

Patch embeddings are ``ln_post(Z) @ proj`` without row 0, divided by their norms.

Source:
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
    2021; Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022; Wang et al.,
    "SCLIP", ECCV 2024; Lan et al., "ClearCLIP", ECCV 2024; Hajimiri et al., "Pay Attention to Your
    Neighbours" (NACLIP), WACV 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zsseg_rt.networks.aggregating import sc_clip, sfp
from zsseg_rt.networks.clip import (
    Head,
    ImageTower,
    Trunk,
    embed_patches,
    patches_of,
    project,
    run_blocks,
)
from zsseg_rt.networks.layers import Block, attend, merge_heads, mlp, projections, residual_block
from zsseg_rt.onnx.operations import Array, Linear, Operations, Value

_PRIOR_STD = 5.0  # of NACLIP, in patches


def dense_embeds(
    ops: Operations, tower: ImageTower, image: Value, head: str, **options: Any
) -> Value:
    """Patch embeddings [B, N, D], unit norm, of an image [B, 3, H, W] of a fixed size.

    Options: ``position``, and ``aggregation`` of SFP and SC-CLIP.
    """
    grid_hw = tower.grid_hw(tuple(image.shape[2:]))
    published = options.get("position") == "as_published"
    x = embed_patches(ops, tower, image, tower.positions(grid_hw, as_published=published))
    outputs = [x, *run_blocks(ops, tower.blocks[:-1], x)]
    with ops.at("last_block"):
        trunk = Trunk(tower=tower, grid_hw=grid_hw, outputs=outputs, options=options)
        patches = ops.mark("last_block", HEADS[head](ops, trunk))
    return ops.mark("patch_embeds", project(ops, tower, patches))


def class_embed(ops: Operations, tower: ImageTower) -> Value:
    """CLIP's own embedding [B, D], which no head changes, unit norm, after :func:`dense_embeds`."""
    before = ops.marks["ln_pre" if len(tower.blocks) == 1 else f"blocks.{len(tower.blocks) - 2}"]
    token = residual_block(ops, before, tower.blocks[-1], num_queries=1)
    return project(ops, tower, token)[:, 0]


def neighbour_prior(grid_hw: tuple[int, int]) -> Array:
    """NACLIP's Gaussian of the distance between patches, [1 + N, 1 + N]; 0 for the class token."""
    rows, columns = (
        np.exp(-((np.arange(size)[:, None] - np.arange(size)) ** 2) / (2 * _PRIOR_STD**2))
        for size in grid_hw
    )
    return np.pad(np.kron(rows, columns), ((1, 0), (1, 0))).astype(np.float32)


def _maskclip(ops: Operations, trunk: Trunk) -> Value:
    return own_values(ops, patches_of(ops, trunk.outputs[-1]), trunk.tower.blocks[-1])


def own_values(
    ops: Operations, patches: Value, block: Block, residual: Value | None = None
) -> Value:
    """A block in which each patch [B, N, W] attends to itself: its two projections are one."""
    weight, bias = block.out
    merged = Linear(weight @ block.value.weight, weight @ block.value.bias + bias)
    norm, (merged,) = ops.fold_norm(block.norm_1, (merged,))
    normed = ops.layer_norm(patches, norm)
    with ops.at("projections.0"):
        mixed = ops.linear(normed, merged)
    return mlp(ops, ops.add(patches if residual is None else residual, mixed), block)


def _attending(*products: str, residual: bool = False) -> Head:
    """A head whose attention is of these products, with or without the block's residual and MLP."""

    def head(ops: Operations, trunk: Trunk) -> Value:
        mixed = _mixed(ops, trunk, products)
        if not residual:
            return mixed
        added = ops.add(patches_of(ops, trunk.outputs[-1]), mixed)
        return mlp(ops, added, trunk.tower.blocks[-1])

    return head


def _naclip(ops: Operations, trunk: Trunk) -> Value:
    return _mixed(ops, trunk, ("kk",), neighbour_prior(trunk.grid_hw))


HEADS: dict[str, Head] = {
    "vanilla": _attending("qk", residual=True),
    "maskclip": _maskclip,
    "sclip": _attending("qq", "kk", residual=True),
    "clearclip": _attending("qq"),
    "naclip": _naclip,
    "sfp": sfp,
    "sc_clip": sc_clip,
}
"""By the name that users give."""

LOGIT_SCALES = {
    **dict.fromkeys(HEADS, 40.0),
    "maskclip": 100.0,
    "vanilla": 100.0,
    "clearclip": 50.0,
}
"""The authors' factors on cosines."""


def _mixed(
    ops: Operations, trunk: Trunk, products: Sequence[str], prior: Array | None = None
) -> Value:
    """``out((sum of softmax(a b^T s + prior)) v)`` of the patches; a and b are named by letters."""
    block = trunk.tower.blocks[-1]
    parts = projections(ops, block, trunk.outputs[-1], products)
    mixed: Value = None
    for product in products:
        query, key = tuple(product)
        scaled = ops.mul(parts[query], np.float32(block.scale))
        one = attend(ops, scaled, parts[key], parts["v"], prior)
        mixed = one if mixed is None else ops.add(mixed, one)
    with ops.at("out_proj"):
        return ops.linear(patches_of(ops, merge_heads(ops, mixed)), block.out)
