"""SFP and SC-CLIP over any :class:`Operations`, with fixed shapes: outliers are a mask.

With L blocks, H_i the tokens after block i (from 0), P(.) their patches, c(.) their class token::

    X  = repair(P(H[L-2])), M = repair(P(H[pre]))      the same outliers in both
    G  = cos(M, M) and T = cos(P(H[post]), P(H[post])), 0 where below beta
    S  = softmax(3 G), only where G is at least its mean; SC-CLIP takes cos(M, M) uncut
    Ya = n(T) (att_a(ln_1(n(G) X)) + r c(H[L-2]))      n divides rows by their sums
    Yb = n(T) (att_b(ln_1(P(Z))) + r c(Z))             Z = sum of H_i, first <= i < end
    embeddings = ln_post(Ya + Yb) @ proj

``att`` is the last block's attention: the mean of S and, in SC-CLIP, softmax(k k^T s); in SFP,
softmax(q q^T s) and softmax(k k^T s) in branch a, nothing else in branch b.

What compares numbers, which float16 could tip over, is in the scope ``float32``. On purpose, an
outlier whose neighbours are all outliers keeps its value (officially NaN everywhere), and grids
need not be square.

Source:
    SFP, ICCV 2025 (code at 2804f5b); SC-CLIP, arXiv 2411.15869 (code at 0417ba9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from zsseg_rt.common.checks import check_choice, check_range
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.networks.clip import Trunk, patches_of
from zsseg_rt.networks.layers import attend, merge_heads, projections, split_heads, unit
from zsseg_rt.onnx.operations import Linear, Operations, Value

_MASKED = np.float32(-1e4)  # its exponential is 0


def sfp(ops: Operations, trunk: Trunk) -> Value:
    """SFP's patches [B, N, W]; option ``aggregation`` is an :class:`AggregationConfig`."""
    return _aggregated(ops, trunk, ("qq", "kk"), ())


def sc_clip(ops: Operations, trunk: Trunk) -> Value:
    """SC-CLIP's patches [B, N, W]; options as :func:`sfp`."""
    return _aggregated(ops, trunk, ("kk",), ("kk",))


def _aggregated(
    ops: Operations, trunk: Trunk, products_a: Sequence[str], products_b: Sequence[str]
) -> Value:
    """The sum of both branches; a branch b without products marks SFP, which cuts S's map."""
    options: AggregationConfig = trunk.options.get("aggregation") or AggregationConfig()
    options.check_depth(len(trunk.outputs))
    cut, last = not products_b, trunk.after(len(trunk.outputs) - 2)
    levels = trunk.after(options.first)
    for block in range(options.first + 1, options.end):
        levels = ops.add(levels, trunk.after(block))
    ops.mark("levels_sum", levels)
    with ops.at("float32"):
        outliers = _outliers(
            ops, trunk, options.pm or RULES_OF_OUTLIERS["sfp" if cut else "sc_clip"], options.r
        )
        x, mid = (
            ops.mark(name, repair(ops, patches_of(ops, tokens), outliers, trunk.grid_hw))
            for name, tokens in (
                ("repaired_last", last),
                ("repaired_mid", trunk.after(options.pre)),
            )
        )
        raw = _cosines(ops, mid)
        g = ops.mark("g", _cut(ops, raw, options.beta))
        late = _cosines(ops, patches_of(ops, trunk.after(options.post)))
        h = ops.mark("h", _cut(ops, late, options.beta))
        attention = ops.mark("sim_attention", _similarity_attention(ops, g if cut else raw))
        aggregated = ops.mark("aggregated", _shared(ops, g, x))
    with ops.at("branch_a"):
        attended = ops.mark("attended", _attended(ops, trunk, aggregated, attention, products_a))
    with ops.at("branch_b"):
        summed = patches_of(ops, levels)
        other = ops.mark("attended_b", _attended(ops, trunk, summed, attention, products_b))
    classes = ops.add(*(ops.slice(tokens, 1, 0, 1) for tokens in (last, levels)))
    both = ops.add(ops.add(attended, other), ops.mul(classes, np.float32(options.r)))
    with ops.at("float32"):
        return _shared(ops, h, both)


def _outliers(ops: Operations, trunk: Trunk, rule: OutlierRule, r: float) -> Value:
    """1 for outliers, else 0, float32 [B, N, 1]."""
    check_grid(rule, trunk.grid_hw)
    patches = patches_of(ops, trunk.outputs[-1])
    batch, num, _ = patches.shape
    if rule == "lof":
        scores, count = local_outlier_factor(ops, patches), num_local_outliers(num)
    elif rule == "l2":
        scores, count = ops.norm(patches, -1), NUM_OUTLIERS
    else:
        scores, count = _attention_scores(ops, trunk, r), NUM_OUTLIERS
    values, places = ops.top_k(ops.reshape(scores, (batch, num)), count)
    valid = ops.greater_or_equal(ops.reshape(values, (batch, count, 1)), np.float32(0))
    one_hot = ops.equal(ops.reshape(places, (batch, count, 1)), np.arange(num)[None, None])
    marked = ops.max(ops.cast(ops.both(one_hot, valid), "float32"), 1)
    return ops.mark("outliers", ops.reshape(marked, (batch, num, 1)))


def _attention_scores(ops: Operations, trunk: Trunk, r: float) -> Value:
    """The class token's attention to patches in the block before the last, -1 behind the gate."""
    block = trunk.tower.blocks[-2]
    normed = ops.layer_norm(trunk.outputs[-2], block.norm_1)
    queries, keys = (
        split_heads(ops, ops.linear(normed, linear, scale), block.num_heads)
        for linear, scale in ((block.query, block.scale), (block.key, 1.0))
    )
    scores = ops.matmul(queries, ops.transpose(keys, (0, 1, 3, 2)))
    largest = ops.max(scores, -1)
    raised = ops.exp(ops.sub(scores, largest))
    total, size = ops.sum(raised, -1), scores.shape[-1]
    own = ops.sum(ops.mul(queries, keys), -1)  # the diagonal of the scores
    own = ops.mean(ops.div(ops.exp(ops.sub(own, largest)), total), 1)
    attention = ops.div(ops.slice(raised, 2, 0, 1), ops.slice(total, 2, 0, 1))
    attention = ops.mul(ops.slice(ops.mean(attention, 1), 3, 1, size), np.float32(5 * r))
    attention = ops.transpose(attention, (0, 1, 3, 2))
    gate = ops.slice(own, 2, 1, size)
    return ops.where(ops.greater(attention, gate), attention, np.float32(-1))


def local_outlier_factor(ops: Operations, patches: Value) -> Value:
    """The local outlier factor [B, N, 1] of patches [B, N, W], with each patch's own reach."""
    x = ops.sub(patches, ops.mean(patches, 1))  # distances are those of smaller numbers
    squares = ops.sum(ops.mul(x, x), -1)
    flipped = ops.transpose(x, (0, 2, 1))
    products = ops.mul(ops.matmul(x, flipped), np.float32(2))
    sums = ops.add(squares, ops.transpose(squares, (0, 2, 1)))
    distance = ops.maximum(ops.sub(sums, products), np.float32(0))
    smallest, _ = ops.top_k(ops.mul(distance, np.float32(-1)), NEIGHBOURS)
    reach = ops.mul(ops.slice(smallest, 2, NEIGHBOURS - 1, NEIGHBOURS), np.float32(-1))
    near = ops.cast(ops.greater_or_equal(reach, distance), "float32")
    density = ops.matmul(near, ops.div(np.ones(1, np.float32), reach))
    score = ops.sub(ops.mul(reach, density), np.float32(1))
    return ops.mul(score, np.float32(1 / (NEIGHBOURS - 1)))


def repair(ops: Operations, x: Value, outliers: Value, grid_hw: tuple[int, int]) -> Value:
    """Patches with outliers replaced by the mean of sound neighbours, where there are any."""
    sound = ops.sub(np.ones(1, np.float32), outliers)
    total = _ring_sum(ops, ops.mul(x, sound), grid_hw)
    count = _ring_sum(ops, sound, grid_hw)
    replaced = ops.both(ops.greater(outliers, np.float32(0)), ops.greater(count, np.float32(0)))
    return ops.where(replaced, ops.div(total, ops.maximum(count, np.float32(1))), x)


def _ring_sum(ops: Operations, x: Value, grid_hw: tuple[int, int]) -> Value:
    """For each cell of [B, N, W] the sum over the up to eight around it."""
    batch, num, width = x.shape
    ring = np.ones((width, 1, 3, 3), np.float32)
    ring[:, :, 1, 1] = 0
    cells = ops.reshape(ops.transpose(x, (0, 2, 1)), (batch, width, *grid_hw))
    summed = ops.conv(cells, Linear(ring), pad=1, groups=width)
    return ops.transpose(ops.reshape(summed, (batch, width, num)), (0, 2, 1))


def _cosines(ops: Operations, x: Value) -> Value:
    rows = unit(ops, x)
    return ops.matmul(rows, ops.transpose(rows, (0, 2, 1)))


def _cut(ops: Operations, similarity: Value, beta: float) -> Value:
    similar = ops.greater_or_equal(similarity, np.float32(beta))
    return ops.where(similar, similarity, np.float32(0))


def _similarity_attention(ops: Operations, similarity: Value) -> Value:
    """Softmax of three times a map, where it is at least its mean, [B, N, N]."""
    mean = ops.mean(ops.mean(similarity, 2), 1)
    raised = ops.mul(similarity, np.float32(3))
    return ops.softmax(ops.where(ops.greater_or_equal(similarity, mean), raised, _MASKED))


def _shared(ops: Operations, similarity: Value, x: Value) -> Value:
    """Sums of ``x`` weighted by rows of a map that are divided by their sums."""
    sums = ops.add(ops.sum(similarity, -1), np.float32(1e-6))
    return ops.matmul(ops.div(similarity, sums), x)


def _attended(
    ops: Operations, trunk: Trunk, x: Value, similarity: Value, products: Sequence[str]
) -> Value:
    """The last block's attention of patches, its output projection included."""
    block = trunk.tower.blocks[-1]
    parts = projections(ops, block, x, products)
    batch, num, _ = similarity.shape
    total = ops.matmul(ops.reshape(similarity, (batch, 1, num, num)), parts["v"])
    for product in products:
        query, key = tuple(product)
        scaled = ops.mul(parts[query], np.float32(block.scale))
        total = ops.add(total, attend(ops, scaled, parts[key], parts["v"]))
    share = np.float32(1 / (1 + len(products)))
    with ops.at("out_proj"):
        return ops.linear(merge_heads(ops, total), Linear(block.out.weight * share, block.out.bias))


OutlierRule = Literal["l2", "som", "lof"]

NUM_OUTLIERS = 10
NEIGHBOURS = 31  # of the local outlier factor, the patch itself included
RULES_OF_OUTLIERS: dict[str, OutlierRule] = {"sfp": "l2", "sc_clip": "lof"}
"""The heads, and how they find outliers unless told."""
SHIPPED_LAYERS = {"pre": 3, "post": 1, "first": 1, "end": 4}
"""For the CLIP that ships, which has six blocks."""


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """Settings of SFP and SC-CLIP; the defaults are official and made for 12 blocks or more."""

    # How outliers are found: "l2", the ten longest patches; "som", at most ten that the class token
    # attends to; "lof", a twentieth of all, by local density. None is the head's: "l2" for SFP,
    # "lof" for SC-CLIP
    pm: OutlierRule | None = None
    r: float = 0.3  # Share of the class token that every patch gets; it also gates "som"
    beta: float = 0.4  # Cosine below which two patches share nothing
    pre: int = 8  # Block whose patches tell which are alike, from 0
    post: int = 3  # The same for the second sharing
    first: int = 3  # First block of the sum Z
    end: int = 10  # One beyond its last block

    def __post_init__(self) -> None:
        if self.pm is not None:
            check_choice("pm", self.pm, get_args(OutlierRule))
        check_range(self, "r")
        if not 0 < self.beta <= 1:
            raise ArgumentError(f"beta: expected a cosine in (0, 1], got {self.beta}. Change it.")

    def check_depth(self, num_layers: int) -> None:
        """Refuse layers that a trunk does not have."""
        last = num_layers - 2
        for name, most in (("pre", last), ("post", last), ("first", last), ("end", last + 1)):
            value = getattr(self, name)
            if not (name == "end") <= value <= most or num_layers < 3:
                raise ArgumentError(
                    f"{name}: expected a block from {int(name == 'end')} to {most} of a trunk of "
                    f"{num_layers} blocks, whose last is the head's, got {value}. Official heads "
                    "need 11 blocks; for fewer set pre, post, first and end."
                )
        if self.first >= self.end:
            raise ArgumentError(
                f"first: expected less than end = {self.end}, got {self.first}. Sum a block."
            )


def check_grid(pm: OutlierRule, grid_hw: tuple[int, int]) -> None:
    """Refuse grids with fewer patches than a rule compares."""
    least = NEIGHBOURS if pm == "lof" else NUM_OUTLIERS
    if math.prod(grid_hw) < least:
        raise ShapeError(
            f"image: expected at least {least} patches for pm = '{pm}', got a grid of "
            f"{grid_hw[0]}x{grid_hw[1]}. Use a larger image."
        )


def num_local_outliers(num_patches: int) -> int:
    """Patches above the 95 % quantile of as many scores."""
    return num_patches - 1 - 95 * (num_patches - 1) // 100
