"""The operations on proposed regions in plain NumPy; part of :mod:`zsseg_rt.ops.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.errors import ShapeError
from zsseg_rt.ops._contract import (
    ANY,
    expect_array,
    expect_dtype,
    expect_label_outs,
    expect_out,
    expect_shape,
    expect_side_range,
    fail_argument,
    label_pair,
    three_numbers,
)
from zsseg_rt.ops._overlap import expect_apart
from zsseg_rt.ops._sampling import grid_taps, resize

__all__ = ["crop_regions", "label_regions", "mask_boxes"]

MAX_CANVAS_SIDE = 4096
MAX_CROP_SIDE = 1024
MAX_CROP_REGIONS = 64
MAX_REGIONS = 256
STYLES = ("cropmask", "mask", "crop")
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
    mask_logits = _checked_masks(mask_logits)
    expect_side_range(
        "canvas_hw", canvas_hw, canvas_hw, "Pass (height, width).", longest=MAX_CANVAS_SIDE
    )
    expect_apart({"out": out}, {"mask_logits": mask_logits})
    result = expect_out("out", out, (len(mask_logits), 5), np.int32)
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
    if style not in STYLES:
        fail_argument("style", "'cropmask', 'mask' or 'crop'", f"'{style}'")
    for name, values in (("scale", scale), ("offset", offset)):
        if len(values) != 3:
            fail_argument(name, "3 finite numbers", f"{len(values)} numbers")
    image, mask_logits = _checked_picture(image, mask_logits)
    inputs = {"image": image, "mask_logits": mask_logits, "regions": regions, "boxes": boxes}
    boxes = _checked_boxes(image, mask_logits, regions, boxes)
    if not 1 <= side <= MAX_CROP_SIDE:
        fail_argument("side", f"from 1 to {MAX_CROP_SIDE}", str(side))
    three_numbers("scale", scale, "3 finite numbers", above=-math.inf)
    three_numbers("offset", offset, "3 finite numbers", above=-math.inf)
    expect_apart({"out": out}, inputs)
    result = expect_out("out", out, (len(regions), 3, side, side), np.float32)

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

    Args:
        image: float32 ``[3, H, W]``.
        box: ``x1, y1, x2, y2``.
        side: Side of the result.

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
    mask_logits, class_scores = _checked_votes(mask_logits, class_scores)
    num_classes = len(class_scores)
    lowered = np.zeros(num_classes, np.float32)
    if bias is not None:
        lowered = expect_array("bias", bias, "float32")
        expect_shape("bias", lowered, (num_classes,))
    expect_side_range("canvas_hw", canvas_hw, canvas_hw, "Pass (height, width).")
    expect_side_range("out_hw", out_hw, out_hw, "Pass (height, width).")
    if unknown_below is not None and math.isnan(unknown_below):
        fail_argument("unknown_below", "a number or None", "nan")
    pair = label_pair(out, with_scores)
    expect_apart(pair, {"mask_logits": mask_logits, "class_scores": class_scores, "bias": bias})
    dtype = np.uint8 if num_classes <= 254 else np.uint16
    labels, scores = expect_label_outs(pair, out_hw, dtype)
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

    Args:
        mask_logits: float32 ``[Q, h, w]``.
        class_scores: float32 ``[C, Q]``.
        canvas_hw: Height and width at which masks become soft.
        out_hw: Height and width of the whole maps.
        rows: Which rows of the maps.

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


def _checked_masks(mask_logits: Array) -> FloatArray:
    masks: FloatArray = expect_array("mask_logits", mask_logits)
    expect_dtype("mask_logits", masks, "float32")
    expect_shape("mask_logits", masks, (ANY, ANY, ANY))
    sides, remedy = (masks.shape[1], masks.shape[2]), "Check the order of its axes."
    expect_side_range("mask_logits", sides, masks.shape, remedy, longest=MAX_CANVAS_SIDE)
    return masks


def _checked_picture(image: Array, mask_logits: Array) -> tuple[FloatArray, FloatArray]:
    image = expect_array("image", image)
    mask_logits = expect_array("mask_logits", mask_logits)
    expect_dtype("image", image, "float32")
    expect_shape("image", image, (3, ANY, ANY))
    expect_side_range(
        "image",
        (image.shape[1], image.shape[2]),
        image.shape,
        "Resize it first.",
        longest=MAX_CANVAS_SIDE,
    )
    return image, _checked_masks(mask_logits)


def _checked_boxes(
    image: FloatArray, mask_logits: FloatArray, regions: Any, boxes: Any
) -> npt.NDArray[np.int32]:
    """The boxes of these regions, [R, 4], given as such or as those of every mask, [Q, 5]."""
    indices = expect_array("regions", regions, "int32")
    expect_shape("regions", indices, (ANY,))
    if len(indices) > MAX_CROP_REGIONS:
        raise ShapeError(
            f"regions: expected at most {MAX_CROP_REGIONS}, got {len(indices)}. "
            "Cut them out in several calls."
        )
    for index in indices.tolist():
        if not 0 <= index < len(mask_logits):
            expected = f"indices of the masks, below {len(mask_logits)}"
            fail_argument("regions", expected, str(index))
    corners: npt.NDArray[np.int32] = expect_array("boxes", boxes, "int32")
    if corners.ndim == 2 and corners.shape[1] == 5:
        expect_shape("boxes", corners, (len(mask_logits), 5))
        corners = corners[indices, :4]
    expect_shape("boxes", corners, (len(indices), 4))
    for x1, y1, x2, y2 in corners.tolist():
        if not (0 <= x1 < x2 <= image.shape[2] and 0 <= y1 < y2 <= image.shape[1]):
            fail_argument("boxes", "x1 < x2 and y1 < y2 within the image", str((x1, y1, x2, y2)))
    return corners


def _checked_votes(mask_logits: Array, class_scores: Array) -> tuple[FloatArray, FloatArray]:
    mask_logits = expect_array("mask_logits", mask_logits)
    class_scores = expect_array("class_scores", class_scores)
    expect_dtype("mask_logits", mask_logits, "float32")
    expect_shape("mask_logits", mask_logits, (ANY, ANY, ANY))
    height, width = mask_logits.shape[1:]
    remedy = "Check the order of its axes."
    expect_side_range("mask_logits", (height, width), mask_logits.shape, remedy)
    expect_dtype("class_scores", class_scores, "float32")
    expect_shape("class_scores", class_scores, (ANY, len(mask_logits)))
    if not 1 <= class_scores.shape[1] <= MAX_REGIONS:
        raise ShapeError(
            f"class_scores: expected from 1 to {MAX_REGIONS} regions, got {class_scores.shape}. "
            "Drop regions."
        )
    if not 1 <= len(class_scores) <= 65534:
        raise ShapeError(
            f"class_scores: expected from 1 to 65534 classes, got {class_scores.shape}. "
            "Set the classes first."
        )
    return mask_logits, class_scores
