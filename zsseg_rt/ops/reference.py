"""The operations of :mod:`zsseg_rt.ops` in plain NumPy: the definition of what is correct.

Signatures and results are those of the native operations. Arrays are NumPy arrays; ``stream`` is
accepted and has no effect. Only the native operations check their arguments: what these make of
others is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import out_or_new
from zsseg_rt.ops.reference_labels import (
    UPSAMPLE_ARGMAX_TOLERANCE,
    activate,
    upsample_argmax,
    upsample_bilinear,
)
from zsseg_rt.ops.reference_preprocess import preprocess, rgb_of_nv12
from zsseg_rt.ops.reference_regions import crop_regions, label_regions, mask_boxes
from zsseg_rt.ops.reference_warp import merge_windows, warp_blend

__all__ = [
    "UPSAMPLE_ARGMAX_TOLERANCE",
    "activate",
    "all_finite",
    "count_labels",
    "crop_regions",
    "ink",
    "label_regions",
    "mask_boxes",
    "merge_windows",
    "overlay",
    "patch_text_similarity",
    "preprocess",
    "relationship_descriptor",
    "relationship_descriptor_text",
    "upsample_argmax",
    "upsample_argmax_overlay",
    "upsample_bilinear",
    "warp_blend",
]


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
    text, weights = text_embeds.astype(np.float32), weight.astype(np.float32)
    text_half = text @ weights[:, embed_dim:].T + bias if text_queries is None else text_queries
    related = cls_embed.astype(np.float32)[:, None, :] * text
    result = out_or_new(out, (len(cls_embed), num_classes, len(weight)), np.float32)
    result[...] = related @ weights[:, :embed_dim].T + text_half
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
    known = labels[labels != np.iinfo(labels.dtype).max]
    result[:-1] = np.bincount(known, minlength=num_classes)[:num_classes]
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
