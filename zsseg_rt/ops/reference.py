"""The operations of :mod:`zsseg_rt.ops` in plain NumPy: the definition of what is correct.

Signatures and results are those of the native operations. Arrays are NumPy arrays; ``stream`` is
accepted and has no effect. Only the native operations check their arguments: what these make of
others is undefined.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array, label_dtype


def relationship_descriptor(
    cls_embed: Array,
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    text_queries: Array | None = None,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.relationship_descriptor`."""
    num_classes, embed_dim = text_embeds.shape
    if text_queries is None:
        text_queries = relationship_descriptor_text(text_embeds, weight, bias)
    related = cls_embed.astype(np.float32)[:, None, :] * text_embeds.astype(np.float32)
    result = out_or_new(out, (len(cls_embed), num_classes, len(weight)), np.float32)
    result[...] = related @ weight.astype(np.float32)[:, :embed_dim].T + text_queries
    return result


def relationship_descriptor_text(
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.relationship_descriptor_text`."""
    num_classes, embed_dim = text_embeds.shape
    result = out_or_new(out, (num_classes, len(weight)), np.float32)
    text, weights = text_embeds.astype(np.float32), weight.astype(np.float32)
    result[...] = text @ weights[:, embed_dim:].T + bias
    return result


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
    batch, num_patches, _ = patch_embeds.shape
    num_classes = text_embeds.shape[-2]
    sizes = (num_patches, num_classes) if classes_last else (num_classes, num_patches)
    result = out_or_new(out, (batch, *sizes), np.float32)

    patches = patch_embeds.astype(np.float32)
    text = text_embeds.astype(np.float32)
    if normalize:
        patches, text = _unit_rows(patches), _unit_rows(text)
    similarity = np.float32(logit_scale) * (text @ patches.transpose(0, 2, 1))
    result[...] = similarity.transpose(0, 2, 1) if classes_last else similarity
    if finite is not None:
        finite[0] = np.isfinite(result).all()
    return result


def _unit_rows(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows divided by their L2 norm; a row of zeros stays zeros."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    divisors: npt.NDArray[np.float32] = np.where(norms == 0, np.float32(1), norms)
    return rows / divisors


def overlay(
    frame: Array | tuple[Array, Array],
    labels: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.uint8]:
    """Reference of :func:`zsseg_rt.ops.overlay`."""
    if isinstance(frame, tuple):
        rgb = rgb_of_nv12(frame[0], frame[1], colour_matrix)
        frame = rgb[..., ::-1] if channel_order == "bgr" else rgb
    result = out_or_new(out, frame.shape, np.uint8)
    unknown = np.iinfo(labels.dtype).max
    coloured = (labels != unknown) & (labels < len(palette))
    colours = frame.copy()
    colours[coloured] = palette[labels[coloured]]
    weight = np.uint32(alpha * 65536 + 0.5)  # in integers, so that all implementations agree
    blended = frame * (np.uint32(65536) - weight) + colours * weight + np.uint32(32768)
    result[...] = blended >> np.uint32(16)
    return result


def upsample_argmax_overlay(
    logits: Array,
    frame: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    out: Array | tuple[Array, Array | None] | None = None,
    picture: Array | None = None,
    stream: int = 0,
    **rule: Any,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None, npt.NDArray[np.uint8]]:
    """Reference of :func:`zsseg_rt.ops.upsample_argmax_overlay`; ``rule``: its other settings."""
    labels, scores = upsample_argmax(logits, frame.shape[:2], out=out, **rule)
    return labels, scores, overlay(frame, labels[0], palette, alpha=alpha, out=picture)


def all_finite(
    values: Array, *, out: Array | None = None, stream: int = 0
) -> npt.NDArray[np.uint8]:
    """Reference of :func:`zsseg_rt.ops.all_finite`."""
    result = out_or_new(out, (1,), np.uint8)
    result[0] = np.isfinite(values).all()
    return result


def count_labels(
    labels: Array, num_classes: int, *, out: Array | None = None, stream: int = 0
) -> npt.NDArray[np.int64]:
    """As :func:`zsseg_rt.ops.count_labels`."""
    result = out_or_new(out, (num_classes + 1,), np.int64)
    labelled = labels[labels != np.iinfo(labels.dtype).max]
    result[:-1] = np.bincount(labelled, minlength=num_classes)[:num_classes]
    result[-1] = labels.size - result[:-1].sum()
    return result


def ink(
    picture: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    place: tuple[int, int],
    colours: Sequence[Sequence[int]],
    *,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.ink`."""
    rows, columns = (
        slice(max(first, 0), max(min(first + of_ink, side), 0))
        for first, of_ink, side in zip(place, weights.shape[1:], picture.shape, strict=False)
    )
    cut = weights[
        :,
        rows.start - place[0] : max(rows.stop - place[0], 0),
        columns.start - place[1] : max(columns.stop - place[1], 0),
    ]
    for layer, colour in zip(cut.astype(np.uint32)[..., None], colours, strict=True):
        window = picture[rows, columns]
        window[...] = (window * (255 - layer) + np.array(colour, np.uint32) * layer + 127) // 255
    return picture


ABSENT_LOGIT = np.float32(-1e20)  # a class that is not above this at a pixel is absent there


def out_or_new(
    out: npt.NDArray[Any] | None, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """The caller's array, or a new one."""
    return np.empty(shape, dtype) if out is None else out


def label_outputs(
    out: Any, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Labels and scores to write; scores that were not asked for are written and dropped."""
    labels, scores = out if isinstance(out, tuple) else (out, None)
    return out_or_new(labels, shape, dtype), out_or_new(scores, shape, np.float32)


def grid_taps(
    source: int, target: int, align: str = "half_pixel", part: slice = slice(None)
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Lower and upper source index, clamped, and the upper one's weight, for target indices."""
    index = np.arange(part.start or 0, target if part.stop is None else part.stop)
    if align == "corners":
        numerator, unit = index * (source - 1), max(target - 1, 1)
    else:
        numerator, unit = (2 * index + 1) * source - target, 2 * target
    lower, remainder = np.divmod(np.clip(numerator, 0, unit * (source - 1)), unit)
    return lower, np.minimum(lower + 1, source - 1), remainder / unit


def resize(
    planes: npt.NDArray[np.float32],
    size_hw: tuple[int, ...],
    rows: Any = slice(None),
    align: str = "half_pixel",
) -> npt.NDArray[np.float32]:
    """Resize ``[..., h, w]``: ``(1 - t) * a + t * b`` down the rows, then along them."""
    top, bottom, down = (taps[rows] for taps in grid_taps(planes.shape[-2], size_hw[0], align))
    left, right, across = grid_taps(planes.shape[-1], size_hw[1], align)
    down, across = down.astype(np.float32)[:, None], across.astype(np.float32)
    edges = (1 - down) * planes[..., top, :] + down * planes[..., bottom, :]
    resized: npt.NDArray[np.float32] = (1 - across) * edges[..., left] + across * edges[..., right]
    return resized


# Labels of any two implementations may differ where the two best classes, activated and after the
# bias, are this close, relative to max(1, their magnitude), or the score is this close to
# unknown_below. By dtype of the logits; float16 logits are widened exactly and processed in
# float32. Without an activation and a bias the native labels equal the reference's bit for bit.
UPSAMPLE_ARGMAX_TOLERANCE = {"float32": 1e-5, "float16": 1e-5}

_LOGIT_LIMIT = np.float32(1e30)  # logits are clamped to it; NaN becomes its negative
_BAND_ROWS = 16  # rows of [C, H, W] held at a time


def upsample_bilinear(
    logits: Array, out_hw: tuple[int, int], align: str = "half_pixel", rows: slice = slice(None)
) -> npt.NDArray[np.float32]:
    """Upsample as :func:`upsample_argmax` does, edges clamped; some rows of the result or all.

    Shapes:
        logits: float32 or float16 ``[B, C, h, w]``; NaN and infinities become finite, +-1e30.

    Returns:
        float32 ``[B, C, H, W]``: ``(1 - t) * a + t * b`` down the rows, then along them.
    """
    wide: npt.NDArray[np.float32] = np.asarray(logits, np.float32)
    finite = np.where(np.isnan(wide), -_LOGIT_LIMIT, wide)
    values = np.clip(finite, -_LOGIT_LIMIT, _LOGIT_LIMIT)
    return np.ascontiguousarray(resize(values, out_hw, rows, align))


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
    for index, first in itertools.product(range(len(logits)), range(0, out_hw[0], _BAND_ROWS)):
        band = slice(first, first + _BAND_ROWS)
        values = upsample_bilinear(logits[index : index + 1], out_hw, align, band)[0]
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


# What is black; then from brightness above it and colour, less 128, to RGB, in multiples of 2^-20:
# brightness; V in red; U and V in green; U in blue. ITU-R BT.601 as OpenCV has it, and BT.709.
YUV_TO_RGB = {
    "bt601": (16, 1220542, 1673527, -409993, -852492, 2116026),
    "bt709": (16, 1220945, 1879825, -223607, -558796, 2215014),
    "bt601-full": (0, 1048576, 1470104, -360853, -748826, 1858077),
    "bt709-full": (0, 1048576, 1651297, -196424, -490864, 1945738),
}


def preprocess(
    frame: Array | tuple[Array, Array],
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    align: str = "half_pixel",
    whole_hw: tuple[int, int] | None = None,
    origin: tuple[int, int] = (0, 0),
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.preprocess`."""
    if isinstance(frame, tuple):
        rgb = rgb_of_nv12(frame[0], frame[1], colour_matrix)
    else:
        rgb = frame[:, :, ::-1] if channel_order == "bgr" else frame
    result = out_or_new(out, (3, *size_hw), np.float32)

    rows, columns = (slice(at, at + size) for at, size in zip(origin, size_hw, strict=True))
    whole = whole_hw or size_hw
    top, bottom, down = grid_taps(rgb.shape[0], whole[0], align, rows)
    left, right, across = grid_taps(rgb.shape[1], whole[1], align, columns)
    across, down = across[:, None], down[:, None, None]
    above = (1 - across) * rgb[top][:, left] + across * rgb[top][:, right]
    below = (1 - across) * rgb[bottom][:, left] + across * rgb[bottom][:, right]
    resized = (1 - down) * above + down * below
    normalised = (resized / 255 - np.asarray(mean)) / np.asarray(std)
    result[...] = normalised.transpose(2, 0, 1)
    return result


def rgb_of_nv12(
    luma: npt.NDArray[Any], chroma: npt.NDArray[Any], colour_matrix: str
) -> npt.NDArray[np.uint8]:
    """RGB of two planes: every pixel takes the colour of its two by two."""
    black, brightness, v_red, u_green, v_green, u_blue = YUV_TO_RGB[colour_matrix]
    grey = brightness * np.maximum(luma.astype(np.int64) - black, 0)
    u, v = (chroma.astype(np.int64) - 128).repeat(2, axis=0).repeat(2, axis=1).transpose(2, 0, 1)
    scaled = np.stack([grey + v_red * v, grey + u_green * u + v_green * v, grey + u_blue * u], -1)
    rgb: npt.NDArray[np.uint8] = np.clip((scaled + (1 << 19)) >> 20, 0, 255).astype(np.uint8)
    return rgb


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
    """Sample a box by RoIAlign, half-pixel aligned, as two products with sampling matrices."""
    rows = _bin_weights(box[1], box[3], image.shape[1], side)
    columns = _bin_weights(box[0], box[2], image.shape[2], side)
    sampled: FloatArray = rows @ (image @ columns.T)
    return sampled


def _bin_weights(start: int, end: int, size: int, side: int) -> FloatArray:
    """How much each pixel of one axis counts in each of ``side`` bins of ``[start, end]``."""
    # float32 in this order of operations: another order moves samples on long boxes by 1e-4 pixels.
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
        labels[band], scores[band] = _region_winners(values, lowered, unknown_below, labels.dtype)
    return labels, scores if with_scores else None


def score_maps(
    mask_logits: FloatArray,
    class_scores: FloatArray,
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    rows: slice = slice(None),
) -> FloatArray:
    """Some rows of the score maps ``[C, H, W]`` of :func:`label_regions`, before the bias."""
    top, bottom, down = (taps[rows] for taps in grid_taps(canvas_hw[0], out_hw[0]))
    used, place = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    logits = resize(mask_logits, canvas_hw, rows=used)
    tail = np.exp(-np.abs(logits))
    soft = (np.where(logits >= 0, np.float32(1), tail) / (1 + tail)).astype(np.float32)
    maps = np.tensordot(class_scores, soft, axes=1)
    left, right, across = grid_taps(canvas_hw[1], out_hw[1])
    down, across = down.astype(np.float32)[:, None], across.astype(np.float32)
    blended = (1 - down) * maps[:, place[: len(top)]] + down * maps[:, place[len(top) :]]
    resized: FloatArray = (1 - across) * blended[..., left] + across * blended[..., right]
    return resized


def _region_winners(
    values: FloatArray, lowered: FloatArray, unknown_below: float | None, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    competing = np.where(np.isnan(values), -np.inf, values - lowered[:, None, None])
    winners = competing.argmax(axis=0)
    scores = np.take_along_axis(values, winners[None], axis=0)[0]
    absent = np.isneginf(competing).all(axis=0)
    scores = np.where(absent, np.float32(0), np.minimum(scores, np.float32(1)))
    unknown = absent if unknown_below is None else absent | (scores < np.float32(unknown_below))
    return np.where(unknown, np.iinfo(dtype).max, winners), scores


def warp_blend(
    logits: Array,
    past: Array,
    flow: Array,
    past_weight: Array,
    *,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.warp_blend`."""
    height, width = logits.shape[2:]
    result = out_or_new(out, logits.shape, np.float32)
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    weight = np.where(inside & (past_weight > 0), np.minimum(past_weight, np.float32(1)), 0)
    moved = _sample(past, np.where(inside, x, 0), np.where(inside, y, 0))
    weight = weight.astype(np.float32)[:, None]
    blended = (1 - weight) * logits + weight * moved
    result[...] = np.where(weight > 0, blended, logits)
    return result


def merge_windows(
    logits: Array,
    shares: Array,
    places: Sequence[tuple[int, int]],
    *,
    add: bool = False,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.merge_windows`."""
    result = out_or_new(out, (1, logits.shape[1], *shares.shape), np.float32)
    if not add:
        result[...] = 0
    for window, (top, left) in zip(logits, places, strict=True):
        part = (..., slice(top, top + window.shape[1]), slice(left, left + window.shape[2]))
        target = result[part]
        target += shares[part] * window[:, : target.shape[2], : target.shape[3]]
    return result


def _sample(
    planes: npt.NDArray[np.float32], x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Planes ``[B, C, h, w]`` at positions ``[B, h, w]``: down the rows, then along them."""
    last_y, last_x = planes.shape[2] - 1, planes.shape[3] - 1
    x, y = np.clip(x, 0, last_x), np.clip(y, 0, last_y)
    left, top = x.astype(np.int64), y.astype(np.int64)
    right, bottom = np.minimum(left + 1, last_x), np.minimum(top + 1, last_y)
    across = (x - left.astype(np.float32))[:, None]
    down = (y - top.astype(np.float32))[:, None]

    def at(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        images = np.arange(len(planes))[:, None, None]
        return planes.transpose(0, 2, 3, 1)[images, row, column].transpose(0, 3, 1, 2)

    edge = (1 - down) * at(top, left) + down * at(bottom, left)
    other = (1 - down) * at(top, right) + down * at(bottom, right)
    moved: npt.NDArray[np.float32] = (1 - across) * edge + across * other
    return moved
