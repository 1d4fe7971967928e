"""The part of :mod:`zsseg_rt.ops.reference` that labels pixels from logits of classes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array, label_dtype
from zsseg_rt.ops._sampling import ABSENT_LOGIT, Taps, grid_taps, label_outputs

# Labels of any two implementations may differ where the two best classes, activated and after the
# bias, are this close, relative to max(1, their magnitude), or the score is this close to
# unknown_below. By dtype of the logits; float16 logits are widened exactly and processed in
# float32. Without an activation and a bias the native labels equal the reference's bit for bit.
UPSAMPLE_ARGMAX_TOLERANCE = {"float32": 1e-5, "float16": 1e-5}

_LOGIT_LIMIT = np.float32(1e30)  # logits are clamped to it; NaN becomes its negative
_BAND_ROWS = 32  # rows of [C, H, W] held at a time


def upsample_bilinear(
    logits: Array, out_hw: tuple[int, int], align: str = "half_pixel"
) -> npt.NDArray[np.float32]:
    """Upsample as :func:`upsample_argmax` does, edges clamped.

    Shapes:
        logits: float32 or float16 ``[B, C, h, w]``; NaN and infinities become finite, +-1e30.

    Returns:
        float32 ``[B, C, H, W]``: ``(1 - t) * a + t * b`` down the rows, then along them.
    """
    rows = grid_taps(logits.shape[2], out_hw[0], align)
    return _upsample(logits, rows, grid_taps(logits.shape[3], out_hw[1], align))


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
    align: str = "half_pixel",
    out: Array | tuple[Array, Array | None] | None = None,
    stream: int = 0,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Reference of :func:`zsseg_rt.ops.upsample_argmax`."""
    batch, classes = logits.shape[:2]
    table = np.arange(classes, dtype=label_dtype(classes)) if label_table is None else label_table
    count = classes if num_classes is None else int(num_classes[0])
    seen = np.zeros(classes, bool) if seen is None else seen
    labels, scores = label_outputs(out, (batch, *out_hw), table.dtype)

    if count == 0:
        labels[...] = np.iinfo(table.dtype).max
        scores[...] = -np.inf if activation == "none" else 0.0
        return labels, scores if with_scores else None
    logits = logits[:, :count]
    lowered = np.float32(seen_bias) * seen[:count].astype(np.float32)[:, None, None]
    columns = grid_taps(logits.shape[3], out_hw[1], align)
    rows = grid_taps(logits.shape[2], out_hw[0], align)
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
