"""The part of :mod:`zsseg_rt.ops.reference` that labels pixels from logits of classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.errors import ShapeError
from zsseg_rt.ops._contract import (
    ABSENT_LOGIT,
    ANY,
    expect_array,
    expect_label_outs,
    expect_logits,
    expect_shape,
    expect_side_range,
    fail_argument,
    label_pair,
)
from zsseg_rt.ops._overlap import expect_apart
from zsseg_rt.ops._sampling import Taps, grid_taps

__all__ = ["UPSAMPLE_ARGMAX_TOLERANCE", "activate", "upsample_argmax", "upsample_bilinear"]

# Labels of any two implementations may differ where the two best classes, activated and after the
# bias, are this close, relative to max(1, their magnitude), or the score is this close to
# unknown_below. By dtype of the logits; float16 logits are widened exactly and processed in
# float32. Without an activation and a bias the native labels equal the reference's bit for bit.
UPSAMPLE_ARGMAX_TOLERANCE = {"float32": 1e-5, "float16": 1e-5}

_LOGIT_LIMIT = np.float32(1e30)  # logits are clamped to it; NaN becomes its negative
_BAND_ROWS = 32  # rows of [C, H, W] held at a time


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
    label_table: Array | None = None,
    num_classes: Array | None = None,
    out: Array | tuple[Array, Array | None] | None = None,
    stream: int = 0,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Reference of :func:`zsseg_rt.ops.upsample_argmax`."""
    if activation not in ("none", "sigmoid", "softmax"):
        fail_argument("activation", "'none', 'sigmoid' or 'softmax'", f"'{activation}'")
    logits, seen = _checked_logits(logits, out_hw, seen)
    table = _checked_table(label_table, logits.shape[1])
    count = _checked_count(num_classes, logits.shape[1])
    if not math.isfinite(seen_bias):
        fail_argument("seen_bias", "a finite number", f"{seen_bias:g}")
    if unknown_below is not None and math.isnan(unknown_below):
        fail_argument("unknown_below", "a number or None", "nan")
    pair = label_pair(out, with_scores)
    tables = {"seen": seen, "label_table": label_table, "num_classes": num_classes}
    expect_apart(pair, {"logits": logits, **tables})
    labels, scores = expect_label_outs(pair, (logits.shape[0], *out_hw), table.dtype)

    if count == 0:
        labels[...] = np.iinfo(table.dtype).max
        scores[...] = -np.inf if activation == "none" else 0.0
        return labels, scores if with_scores else None
    logits = logits[:, :count]
    lowered = np.float32(seen_bias) * seen[:count].astype(np.float32)[:, None, None]
    columns = grid_taps(logits.shape[3], out_hw[1])
    rows = grid_taps(logits.shape[2], out_hw[0])
    for index, first in itertools.product(range(len(logits)), range(0, out_hw[0], _BAND_ROWS)):
        band = slice(first, first + _BAND_ROWS)
        band_rows = (rows[0][band], rows[1][band], rows[2][band])
        values = _upsample(logits[index : index + 1], band_rows, columns)[0]
        winners, scores[index, band] = _winners(values, activation, lowered, unknown_below)
        labels[index, band] = np.where(
            winners < 0, np.iinfo(table.dtype).max, table[np.maximum(winners, 0)]
        )
    return labels, scores if with_scores else None


def _winners(
    values: npt.NDArray[np.float32],
    activation: str,
    lowered: npt.NDArray[np.float32],
    unknown_below: float | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Class, -1 if unknown, and score of every pixel from upsampled logits ``[C, H, W]``."""
    absent = values <= ABSENT_LOGIT
    activated = activate(np.where(absent, -np.inf, values), activation)
    calibrated = np.where(absent, -np.inf, activated - lowered)
    winners = calibrated.argmax(axis=0)
    best = np.take_along_axis(activated, winners[None], axis=0)[0]
    is_unknown = absent.all(axis=0)
    if unknown_below is not None:
        is_unknown |= best < np.float32(unknown_below)
    return np.where(is_unknown, -1, winners), best


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
    logits = expect_logits("logits", logits, "float32", "float16", "bfloat16")
    classes = logits.shape[1]
    expect_side_range("out_hw", out_hw, out_hw, "Pass (height, width).")
    if seen is None:
        return logits, np.zeros(classes, bool)
    seen = expect_array("seen", seen, "bool")
    expect_shape("seen", seen, (classes,))
    return logits, seen


def _checked_table(table: Array | None, classes: int) -> npt.NDArray[Any]:
    """What is stored for each class; without a table the class itself."""
    if table is None:
        return np.arange(classes, dtype=np.uint8 if classes <= 254 else np.uint16)
    table = expect_array("label_table", expect_array("label_table", table), "uint8", "uint16")
    expect_shape("label_table", table, (ANY,))
    if len(table) < classes:
        raise ShapeError(
            f"label_table: expected at least {classes} labels, one a class, got {len(table)}. "
            "Make it longer."
        )
    return table


def _checked_count(num_classes: Array | None, classes: int) -> int:
    """How many classes count."""
    if num_classes is None:
        return classes
    given = expect_array("num_classes", expect_array("num_classes", num_classes), "int32")
    expect_shape("num_classes", given, (1,))
    if not 0 <= given[0] <= classes:
        fail_argument("num_classes", f"from 0 to {classes}", str(given[0]))
    return int(given[0])
