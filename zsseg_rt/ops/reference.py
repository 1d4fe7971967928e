"""The operations of :mod:`zsseg_rt.ops` in plain NumPy: the definition of what is correct.

Signatures, results and errors are those of the native operations. Arrays are NumPy arrays;
``stream`` is accepted and has no effect.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.ops._contract import (
    ANY,
    expect_array,
    expect_logits,
    expect_out,
    expect_shape,
    expect_side_range,
    fail_argument,
    three_numbers,
)
from zsseg_rt.ops._sampling import Taps, grid_taps
from zsseg_rt.ops.reference_regions import crop_regions, label_regions, mask_boxes
from zsseg_rt.ops.reference_warp import warp_blend

__all__ = [
    "UPSAMPLE_ARGMAX_TOLERANCE",
    "activate",
    "all_finite",
    "count_labels",
    "crop_regions",
    "label_regions",
    "mask_boxes",
    "overlay",
    "patch_text_similarity",
    "preprocess",
    "relationship_descriptor",
    "relationship_descriptor_text",
    "upsample_argmax",
    "upsample_bilinear",
    "warp_blend",
]


def preprocess(
    frame: Array,
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.preprocess`."""
    frame = expect_array("frame", frame)
    three_numbers("mean", mean, "3 finite numbers", above=-math.inf)
    three_numbers("std", std, "3 finite numbers above 0", above=0.0)
    if channel_order not in ("rgb", "bgr"):
        fail_argument("channel_order", "'rgb' or 'bgr'", f"'{channel_order}'")
    expect_array("frame", frame, "uint8")
    expect_shape("frame", frame, (ANY, ANY, 3))
    height, width = frame.shape[:2]
    expect_side_range("frame", (height, width), frame.shape, "Check that the frame was read.")
    expect_side_range("size_hw", size_hw, size_hw, "Pass (height, width).")
    result = expect_out("out", out, (3, *size_hw), np.float32)

    rgb = frame[:, :, ::-1] if channel_order == "bgr" else frame
    top, bottom, down = _bilinear_taps(height, size_hw[0])
    left, right, across = _bilinear_taps(width, size_hw[1])
    across, down = across[:, None], down[:, None, None]
    above = (1 - across) * rgb[top][:, left] + across * rgb[top][:, right]
    below = (1 - across) * rgb[bottom][:, left] + across * rgb[bottom][:, right]
    resized = (1 - down) * above + down * below
    normalised = (resized / 255 - np.asarray(mean)) / np.asarray(std)
    result[...] = normalised.transpose(2, 0, 1)
    return result


def _bilinear_taps(
    source: int, target: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Lower and upper source index and the upper one's weight, for every target index."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    lower = np.floor(position).astype(np.intp)
    return lower, np.minimum(lower + 1, source - 1), position - lower


def relationship_descriptor(
    cls_embed: Array,
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    text_queries: Array | None = None,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.relationship_descriptor`."""
    cls_embed = expect_array("cls_embed", cls_embed)
    text_embeds, weight, bias = _text_half_arrays(text_embeds, weight, bias)
    num_classes, embed_dim = text_embeds.shape
    expect_array("cls_embed", cls_embed, "float32")
    expect_shape("cls_embed", cls_embed, (ANY, embed_dim))
    if text_queries is None:
        text_half = text_embeds @ weight[:, embed_dim:].T + bias
    else:
        text_half = expect_array("text_queries", text_queries, "float32")
        expect_shape("text_queries", text_half, (num_classes, weight.shape[0]))
    shape = (cls_embed.shape[0], num_classes, weight.shape[0])
    result = expect_out("out", out, shape, np.float32)

    related = cls_embed[:, None, :] * text_embeds
    result[...] = related @ weight[:, :embed_dim].T + text_half
    return result


def relationship_descriptor_text(
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.relationship_descriptor_text`."""
    text_embeds, weight, bias = _text_half_arrays(text_embeds, weight, bias)
    num_classes, embed_dim = text_embeds.shape
    result = expect_out("out", out, (num_classes, weight.shape[0]), np.float32)
    result[...] = text_embeds @ weight[:, embed_dim:].T + bias
    return result


def _text_half_arrays(
    text_embeds: Array, weight: Array, bias: Array
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    text_embeds = expect_array("text_embeds", text_embeds)
    weight = expect_array("weight", weight)
    bias = expect_array("bias", bias)
    expect_array("text_embeds", text_embeds, "float32")
    expect_shape("text_embeds", text_embeds, (ANY, ANY))
    expect_array("weight", weight, "float32")
    expect_shape("weight", weight, (ANY, 2 * text_embeds.shape[1]))
    expect_array("bias", bias, "float32")
    expect_shape("bias", bias, (weight.shape[0],))
    return text_embeds, weight, bias


def patch_text_similarity(
    patch_embeds: Array,
    text_embeds: Array,
    *,
    logit_scale: float = 1.0,
    normalize: bool = True,
    classes_last: bool = False,
    out: Array | None = None,
    finite: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.patch_text_similarity`."""
    patch_embeds = expect_array("patch_embeds", patch_embeds)
    text_embeds = expect_array("text_embeds", text_embeds)
    expect_array("patch_embeds", patch_embeds, "float32", "float16")
    expect_shape("patch_embeds", patch_embeds, (ANY, ANY, ANY))
    expect_array("text_embeds", text_embeds, "float32", "float16")
    batch, num_patches, embed_dim = patch_embeds.shape
    shared = text_embeds.ndim != 3
    pattern = (ANY, embed_dim) if shared else (batch, ANY, embed_dim)
    expect_shape("text_embeds", text_embeds, pattern)
    if not math.isfinite(logit_scale):
        fail_argument("logit_scale", "a finite number", f"{logit_scale:g}")
    num_classes = text_embeds.shape[-2]
    sizes = (num_patches, num_classes) if classes_last else (num_classes, num_patches)
    result = expect_out("out", out, (batch, *sizes), np.float32)
    answer = expect_out("finite", finite, (1,), np.uint8)

    patches = patch_embeds.astype(np.float32)
    text = text_embeds.astype(np.float32)
    if normalize:
        patches, text = _unit_rows(patches), _unit_rows(text)
    similarity = np.float32(logit_scale) * (text @ patches.transpose(0, 2, 1))
    result[...] = similarity.transpose(0, 2, 1) if classes_last else similarity
    answer[0] = np.isfinite(result).all()
    return result


def _unit_rows(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows divided by their L2 norm; a row of zeros stays zeros."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    divisors: npt.NDArray[np.float32] = np.where(norms == 0, np.float32(1), norms)
    return rows / divisors


# Labels of any two implementations may differ where the two best classes, activated and after the
# bias, are this close, relative to max(1, their magnitude), or the score is this close to
# unknown_below. By dtype of the logits; float16 logits are widened exactly and processed in
# float32. Without an activation and a bias the native labels equal the reference's bit for bit.
UPSAMPLE_ARGMAX_TOLERANCE = {"float32": 1e-5, "float16": 1e-5}

_LOGIT_LIMIT = np.float32(1e30)  # logits are clamped to it; NaN becomes its negative
_BAND_ROWS = 32  # rows of [C, H, W] held at a time
_ABSENT_LOGIT = np.float32(-1e20)  # a class that is not above this at a pixel is absent there


def upsample_bilinear(logits: Array, out_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Upsample as :func:`upsample_argmax` does: half-pixel centres, edges clamped.

    Args:
        logits: float32 or float16 ``[B, C, h, w]``; NaN and infinities become finite, +-1e30.
        out_hw: Height and width of the result.

    Returns:
        float32 ``[B, C, H, W]``: ``(1 - t) * a + t * b`` down the rows, then along them.
    """
    rows = grid_taps(logits.shape[2], out_hw[0])
    return _upsample(logits, rows, grid_taps(logits.shape[3], out_hw[1]))


def _upsample(logits: Array, rows: Taps, columns: Taps) -> npt.NDArray[np.float32]:
    wide: npt.NDArray[np.float32] = np.asarray(logits, np.float32)
    finite = np.where(np.isnan(wide), -_LOGIT_LIMIT, wide)
    values = np.clip(finite, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    (top, bottom, down), (left, right, across) = rows, columns
    down = down[:, None]
    edges = (1 - down) * values[:, :, top] + down * values[:, :, bottom]
    return np.ascontiguousarray((1 - across) * edges[..., left] + across * edges[..., right])


def upsample_argmax(
    logits: Array,
    out_hw: tuple[int, int],
    *,
    activation: str = "none",
    seen: Array | None = None,
    seen_bias: float = 0.0,
    unknown_below: float | None = None,
    with_scores: bool = False,
    out: Array | tuple[Array, Array | None] | None = None,
    stream: int = 0,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Reference of :func:`zsseg_rt.ops.upsample_argmax`."""
    if activation not in ("none", "sigmoid", "softmax"):
        fail_argument("activation", "'none', 'sigmoid' or 'softmax'", f"'{activation}'")
    logits, seen = _checked_logits(logits, out_hw, seen)
    if not math.isfinite(seen_bias):
        fail_argument("seen_bias", "a finite number", f"{seen_bias:g}")
    if unknown_below is not None and math.isnan(unknown_below):
        fail_argument("unknown_below", "a number or None", "nan")
    labels, scores = _label_outputs(out, (logits.shape[0], *out_hw), logits.shape[1], with_scores)

    lowered = np.float32(seen_bias) * seen.astype(np.float32)[:, None, None]
    columns = grid_taps(logits.shape[3], out_hw[1])
    rows = grid_taps(logits.shape[2], out_hw[0])
    for index, first in itertools.product(range(len(logits)), range(0, out_hw[0], _BAND_ROWS)):
        band = slice(first, first + _BAND_ROWS)
        band_rows = (rows[0][band], rows[1][band], rows[2][band])
        values = _upsample(logits[index : index + 1], band_rows, columns)[0]
        labels[index, band], scores[index, band] = _winners(
            values, activation, lowered, unknown_below, np.iinfo(labels.dtype).max
        )
    return labels, scores if with_scores else None


def _winners(
    values: npt.NDArray[np.float32],
    activation: str,
    lowered: npt.NDArray[np.float32],
    unknown_below: float | None,
    unknown: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Label and score of every pixel from upsampled logits ``[C, H, W]``."""
    absent = values <= _ABSENT_LOGIT
    activated = activate(np.where(absent, -np.inf, values), activation)
    calibrated = np.where(absent, -np.inf, activated - lowered)
    winners = calibrated.argmax(axis=0)
    best = np.take_along_axis(activated, winners[None], axis=0)[0]
    is_unknown = absent.all(axis=0)
    if unknown_below is not None:
        is_unknown |= best < np.float32(unknown_below)
    return np.where(is_unknown, unknown, winners), best


def activate(values: npt.NDArray[np.float32], activation: str) -> npt.NDArray[np.float32]:
    """Apply an activation in float64, rounding once; an absent class (-infinity) gets 0."""
    if activation == "none":
        return values
    wide = values.astype(np.float64)
    if activation == "sigmoid":
        tail = np.exp(-np.abs(wide))
        return (np.where(wide >= 0, 1.0, tail) / (1.0 + tail)).astype(np.float32)
    peak = wide.max(axis=0)
    terms = np.exp(wide - np.where(np.isfinite(peak), peak, 0.0))
    shares: npt.NDArray[np.float64] = terms / np.maximum(terms.sum(axis=0), 1e-300)
    return shares.astype(np.float32)


def _checked_logits(
    logits: Array, out_hw: tuple[int, int], seen: Array | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    logits = expect_logits("logits", logits, "float32", "float16")
    classes = logits.shape[1]
    expect_side_range("out_hw", out_hw, out_hw, "Pass (height, width).")
    if seen is None:
        return logits, np.zeros(classes, bool)
    seen = expect_array("seen", seen, "bool")
    expect_shape("seen", seen, (classes,))
    return logits, seen


def _label_outputs(
    out: Any, shape: tuple[int, ...], classes: int, with_scores: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Labels and scores to write; scores that were not asked for are written and dropped."""
    pair = out if isinstance(out, tuple) else (out, None)
    if len(pair) != 2:
        fail_argument("out", "labels or a pair of labels and scores", f"{len(pair)} arrays")
    if not with_scores and pair[1] is not None:
        fail_argument("out", "labels only, because with_scores is False", "labels and scores")
    labels = expect_out("labels", pair[0], shape, np.uint8 if classes <= 254 else np.uint16)
    return labels, expect_out("scores", pair[1], shape, np.float32)


def overlay(
    frame: Array,
    labels: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.uint8]:
    """Reference of :func:`zsseg_rt.ops.overlay`."""
    frame = expect_array("frame", frame)
    labels = expect_array("labels", labels)
    palette = expect_array("palette", palette)
    expect_array("frame", frame, "uint8")
    expect_shape("frame", frame, (ANY, ANY, 3))
    expect_array("labels", labels, "uint8", "uint16")
    expect_shape("labels", labels, frame.shape[:2])
    expect_array("palette", palette, "uint8")
    expect_shape("palette", palette, (ANY, 3))
    if not 0.0 <= alpha <= 1.0:
        fail_argument("alpha", "a number in [0, 1]", f"{alpha:g}")
    result = expect_out("out", out, frame.shape, np.uint8)

    unknown = np.iinfo(labels.dtype).max
    coloured = (labels != unknown) & (labels < len(palette))
    colours = frame.copy()
    colours[coloured] = palette[labels[coloured]]
    weight = np.uint32(alpha * 65536 + 0.5)  # in integers, so that all implementations agree
    blended = frame * (np.uint32(65536) - weight) + colours * weight + np.uint32(32768)
    result[...] = blended >> np.uint32(16)
    return result


def all_finite(
    values: Array, *, out: Array | None = None, stream: int = 0
) -> npt.NDArray[np.uint8]:
    """Reference of :func:`zsseg_rt.ops.all_finite`."""
    values = expect_array("values", values, "float32", "float16")
    result = expect_out("out", out, (1,), np.uint8)
    result[0] = np.isfinite(values).all()
    return result


def count_labels(
    labels: Array, num_classes: int, *, out: Array | None = None, stream: int = 0
) -> npt.NDArray[np.int64]:
    """As :func:`zsseg_rt.ops.count_labels`."""
    labels = expect_array("labels", labels, "uint8", "uint16")
    if not 0 <= num_classes <= 65534:
        fail_argument("num_classes", "from 0 to 65534", str(num_classes))
    result = expect_out("out", out, (num_classes + 1,), np.int64)
    known = labels[labels != np.iinfo(labels.dtype).max]
    result[:-1] = np.bincount(known, minlength=num_classes)[:num_classes]
    result[-1] = labels.size - result[:-1].sum()
    return result
