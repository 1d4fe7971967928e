"""The operations on proposed regions in plain NumPy; part of :mod:`zsseg_rt.ops.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array, label_dtype
from zsseg_rt.ops._sampling import grid_taps, label_outputs, out_or_new, resize

_BAND_ROWS = 16  # rows of [C, H, W] held at a time

FloatArray = npt.NDArray[np.float32]


def mask_boxes(
    mask_logits: Array,
    canvas_hw: tuple[int, int],
    *,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.int32]:
    """Reference of :func:`zsseg_rt.ops.mask_boxes`."""
    result = out_or_new(out, (len(mask_logits), 5), np.int32)
    for box, logits in zip(result, mask_logits, strict=True):
        inside = resize(logits, canvas_hw) > 0
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        box[:4] = 0, 0, canvas_hw[1], canvas_hw[0]
        if len(rows) and rows[0] < rows[-1] and columns[0] < columns[-1]:
            box[:4] = columns[0], rows[0], columns[-1], rows[-1]
        box[4] = inside.sum()
    return result


def crop_regions(
    image: Array,
    mask_logits: Array,
    regions: Array,
    boxes: Array,
    *,
    side: int,
    style: str = "cropmask",
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    offset: Sequence[float] = (0.0, 0.0, 0.0),
    out: Array | None = None,
    stream: int = 0,
) -> FloatArray:
    """Reference of :func:`zsseg_rt.ops.crop_regions`."""
    boxes = boxes[regions, :4] if boxes.shape[1] == 5 else boxes
    result = out_or_new(out, (len(regions), 3, side, side), np.float32)

    factors = np.asarray(scale, np.float32)[:, None, None]
    shown = image * factors + np.asarray(offset, np.float32)[:, None, None]
    small = resize(shown, (side, side)) if style == "mask" else None
    for crop, region, box in zip(result, regions, boxes, strict=True):
        logits = resize(mask_logits[region], image.shape[1:])
        if small is not None:
            crop[...] = small * (resize(logits, (side, side)) > 0)
            continue
        pixels = shown * (logits > 0) if style == "cropmask" else shown
        crop[...] = roi_align(pixels, [int(value) for value in box], side)
    return result


def roi_align(image: FloatArray, box: Sequence[int], side: int) -> FloatArray:
    """Sample a box by RoIAlign, half-pixel aligned, as two products with sampling matrices.

    Shapes:
        image: float32 ``[3, H, W]``.

    Returns:
        float32 ``[3, side, side]``.
    """
    rows = _bin_weights(box[1], box[3], image.shape[1], side)
    columns = _bin_weights(box[0], box[2], image.shape[2], side)
    sampled: FloatArray = rows @ (image @ columns.T)
    return sampled


def _bin_weights(start: int, end: int, size: int, side: int) -> FloatArray:
    """How much each pixel of one axis counts in each of ``side`` bins of ``[start, end]``.

    float32 in this order of operations: another order moves samples on long boxes by 1e-4 pixels.
    """
    num_samples = max(1, -(-(end - start) // side))
    length = np.float32(end - start) / np.float32(side)
    bins = np.arange(side, dtype=np.float32)[:, None]
    samples = np.arange(num_samples, dtype=np.float32) + np.float32(0.5)
    at = (np.float32(start - 0.5) + bins * length) + samples * length / np.float32(num_samples)
    at = np.clip(at, 0, size - 1)
    lower = at.astype(np.int64)
    upper, fraction = np.minimum(lower + 1, size - 1), at - lower
    weights = np.zeros((side, size), np.float32)
    row = np.broadcast_to(np.arange(side)[:, None], at.shape)
    np.add.at(weights, (row, lower), 1 - fraction)
    np.add.at(weights, (row, upper), fraction)
    return weights / np.float32(num_samples)


def label_regions(
    mask_logits: Array,
    class_scores: Array,
    *,
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    bias: Array | None = None,
    unknown_below: float | None = None,
    with_scores: bool = False,
    out: Array | tuple[Array, Array | None] | None = None,
    stream: int = 0,
) -> tuple[npt.NDArray[Any], FloatArray | None]:
    """Reference of :func:`zsseg_rt.ops.label_regions`."""
    num_classes = len(class_scores)
    lowered = np.zeros(num_classes, np.float32) if bias is None else bias
    labels, scores = label_outputs(out, out_hw, label_dtype(num_classes))
    for first in range(0, out_hw[0], _BAND_ROWS):
        band = slice(first, first + _BAND_ROWS)
        values = score_maps(mask_logits, class_scores, canvas_hw, out_hw, rows=band)
        labels[band], scores[band] = _winners(values, lowered, unknown_below, labels.dtype)
    return labels, scores if with_scores else None


def score_maps(
    mask_logits: FloatArray,
    class_scores: FloatArray,
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    rows: slice = slice(None),
) -> FloatArray:
    """Some rows of the score maps of :func:`label_regions`, before the bias.

    Shapes:
        mask_logits: float32 ``[Q, h, w]``.
        class_scores: float32 ``[C, Q]``.

    Returns:
        float32 ``[C, len(rows), W]``.
    """
    top, bottom, down = (taps[rows] for taps in grid_taps(canvas_hw[0], out_hw[0]))
    used, place = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    logits = resize(mask_logits, canvas_hw, rows=used)
    tail = np.exp(-np.abs(logits))
    soft = (np.where(logits >= 0, np.float32(1), tail) / (1 + tail)).astype(np.float32)
    maps = np.tensordot(class_scores, soft, axes=1)
    down = down[:, None]
    blended = (1 - down) * maps[:, place[: len(top)]] + down * maps[:, place[len(top) :]]
    left, right, across = grid_taps(canvas_hw[1], out_hw[1])
    resized: FloatArray = (1 - across) * blended[..., left] + across * blended[..., right]
    return resized


def _winners(
    values: FloatArray, lowered: FloatArray, unknown_below: float | None, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    competing = np.where(np.isnan(values), -np.inf, values - lowered[:, None, None])
    winners = competing.argmax(axis=0)
    scores = np.take_along_axis(values, winners[None], axis=0)[0]
    absent = np.isneginf(competing).all(axis=0)
    scores = np.where(absent, np.float32(0), np.minimum(scores, np.float32(1)))
    unknown = absent if unknown_below is None else absent | (scores < np.float32(unknown_below))
    return np.where(unknown, np.iinfo(dtype).max, winners), scores
