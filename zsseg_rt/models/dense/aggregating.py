"""SFP and SC-CLIP: outlier patches are repaired, then patches that look alike share features.

With L blocks, H_i the tokens after block i (from 0), P(.) their patches, c(.) their class token::

    X  = repair(P(H[L-2])), M = repair(P(H[pre]))      the same outliers in both
    G  = cos(M, M) and T = cos(P(H[post]), P(H[post])), 0 where below beta
    S  = softmax(3 G), only where G is at least its mean; SC-CLIP takes cos(M, M) uncut
    Ya = n(T) (att_a(ln_1(n(G) X)) + r c(H[L-2]))      n divides rows by their sums
    Yb = n(T) (att_b(ln_1(P(Z))) + r c(Z))             Z = sum of H_i, first <= i < end
    embeddings = ln_post(Ya + Yb) @ proj

``att`` is the last block's attention: the mean of S and, in SC-CLIP, softmax(k k^T s); in SFP,
softmax(q q^T s) and softmax(k k^T s) in branch a, nothing else in branch b.

Two things differ from the official code on purpose: an outlier whose neighbours are all outliers
keeps its value (SFP: 0, then NaN everywhere), and grids need not be square.

Source:
    SFP, ICCV 2025 (code at 2804f5b); SC-CLIP, arXiv 2411.15869 (code at 0417ba9).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.models.clip.image_encoder import ImageEncoderConfig, unit
from zsseg_rt.models.clip.transformer import ResidualBlock, merge_heads
from zsseg_rt.models.dense.encoder import DenseImageEncoder, Head, Position
from zsseg_rt.networks.aggregating import (
    NEIGHBOURS,
    NUM_OUTLIERS,
    RULES_OF_OUTLIERS,
    AggregationConfig,
    OutlierRule,
    check_grid,
    num_local_outliers,
)

_EPS = 1e-6


class Stages(NamedTuple):
    """Everything that a head computes before ``ln_post``; maps are ``[B, N, N]``."""

    outliers: Tensor  # [B, N], 1 or 0
    repaired_last: Tensor
    repaired_mid: Tensor
    g: Tensor
    h: Tensor
    sim_attention: Tensor
    aggregated: Tensor
    attended: Tensor
    attended_b: Tensor
    branch_a: Tensor
    branch_b: Tensor


def local_outlier_factor(x: Tensor) -> Tensor:
    """The local outlier factor ``[B, N]`` of patches ``[B, N, W]``, with each patch's own reach.

    One density per patch is left of the official steps: see ``NEIGHBOURS``.
    """
    x = x - x.mean(dim=1, keepdim=True)  # distances are those of smaller numbers
    squares = (x * x).sum(dim=-1)
    distance = squares[:, :, None] + squares[:, None] - 2 * x @ x.mT
    distance = distance.clamp_min(0) * (1 - torch.eye(x.shape[1], device=x.device))
    reach = distance.topk(NEIGHBOURS, largest=False).values[..., -1]
    near = (distance <= reach[..., None]).to(x.dtype)
    return (reach * (near @ (1 / reach)[..., None])[..., 0] - 1) / (NEIGHBOURS - 1)


def _mark(scores: Tensor, count: int) -> Tensor:
    """1 at the ``count`` highest scores that are not negative, else 0, ``[B, N]``."""
    best = scores.topk(count)
    return torch.zeros_like(scores).scatter(1, best.indices, (best.values >= 0).to(scores.dtype))


def repair(x: Tensor, outliers: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Replace outliers ``[B, N]`` of ``x`` ``[B, N, W]`` by the mean of sound neighbours.

    Of up to eight; one without any keeps its value. Other patches stay bit by bit.
    """
    kept = (1 - outliers)[..., None]
    maps = torch.unflatten(torch.cat([x * kept, kept], dim=-1).mT, 2, grid_hw)
    ring = maps.new_ones(maps.shape[1], 1, 3, 3)
    ring[..., 1, 1] = 0
    sums = F.conv2d(maps, ring, padding=1, groups=maps.shape[1]).flatten(2).mT
    count = sums[..., -1:]
    replaced = (outliers[..., None] > 0) & (count > 0)
    return torch.where(replaced, sums[..., :-1] / count.clamp_min(1), x)


def similarity_attention(similarity: Tensor) -> Tensor:
    """Rows of the softmax of three times a map, where it is at least its mean, ``[B, N, N]``."""
    below = similarity < similarity.mean(dim=(1, 2), keepdim=True)
    return (3 * similarity).masked_fill(below, -math.inf).softmax(dim=-1)


def _share(similarity: Tensor, x: Tensor) -> Tensor:
    """Sums of ``x`` weighted by the rows of a map, which are divided by their sums."""
    return similarity / (similarity.sum(dim=-1, keepdim=True) + _EPS) @ x


class AggregatingEncoder(DenseImageEncoder):
    """CLIP's image tower with SFP's or SC-CLIP's head."""

    def __init__(
        self,
        config: ImageEncoderConfig,
        head: Head,
        settings: AggregationConfig,
        position: Position = "size",
    ) -> None:
        super().__init__(config, head, position=position)
        settings.check_depth(config.num_layers)
        self.settings = settings
        self.pm: OutlierRule = settings.pm or RULES_OF_OUTLIERS[head]
        self.cut = head == "sfp"

    def dense_embeds(self, inputs: list[Tensor], grid_hw: tuple[int, int]) -> Tensor:
        """See :meth:`DenseImageEncoder.dense_embeds`."""
        stages = self.stages(inputs, grid_hw)
        return self.embed_dense(stages.branch_a + stages.branch_b)

    def stages(self, inputs: list[Tensor], grid_hw: tuple[int, int]) -> Stages:
        """Run the head on :meth:`DenseImageEncoder.block_inputs`."""
        check_grid(self.pm, grid_hw)
        options, hidden, ln_1 = self.settings, inputs[1:], self.last_block.ln_1
        last, levels = hidden[-1], torch.stack(hidden[options.first : options.end]).sum(dim=0)
        outliers = self._outliers(inputs)
        x, mid = (repair(h[:, 1:], outliers, grid_hw) for h in (last, hidden[options.pre]))
        raw, late = unit(mid), unit(hidden[options.post][:, 1:])
        raw, late = raw @ raw.mT, late @ late.mT
        g, h = (m * (m >= options.beta) for m in (raw, late))
        attention = similarity_attention(g if self.cut else raw)
        aggregated, products = _share(g, x), self.rule.products
        attended = self._attend(ln_1(aggregated), attention, products)
        attended_b = self._attend(ln_1(levels[:, 1:]), attention, () if self.cut else products)
        return Stages(
            outliers,
            x,
            mid,
            g,
            h,
            attention,
            aggregated,
            attended,
            attended_b,
            _share(h, attended + options.r * last[:, :1]),
            _share(h, attended_b + options.r * levels[:, :1]),
        )

    def _outliers(self, inputs: list[Tensor]) -> Tensor:
        patches = inputs[-1][:, 1:]
        if self.pm == "lof":
            count = num_local_outliers(patches.shape[1])
            return _mark(local_outlier_factor(patches), count)
        if self.pm == "l2":
            return _mark((patches * patches).sum(dim=-1), NUM_OUTLIERS)
        block = self.transformer.resblocks[-2]
        assert isinstance(block, ResidualBlock)
        attention = block.attn.weights(block.ln_1(inputs[-2])).mean(dim=1)
        seen = 5 * self.settings.r * attention[:, 0, 1:]
        gate = attention.diagonal(dim1=1, dim2=2)[:, 1:]
        return _mark(torch.where(seen > gate, seen, -1), NUM_OUTLIERS)

    def _attend(
        self, x: Tensor, similarity: Tensor, products: tuple[tuple[str, str], ...]
    ) -> Tensor:
        """The last block's attention of normalised patches, its output projection included."""
        parts = self.last_block.attn.project(x)
        total = similarity[:, None] @ parts["v"]
        for query, key in products:
            total = total + F.scaled_dot_product_attention(parts[query], parts[key], parts["v"])
        attended = merge_heads(total / (1 + len(products)))
        return self.last_block.attn.out_proj(attended)  # type: ignore[no-any-return]
