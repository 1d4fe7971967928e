"""The operations of :mod:`zsseg_rt.ops` in plain NumPy: the definition of what is correct.

Signatures, results and errors are those of the native operations. Arrays are NumPy arrays;
``stream`` is accepted and has no effect.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.errors import ShapeError
from zsseg_rt.ops._contract import (
    ANY,
    expect_array,
    expect_dtype,
    expect_out,
    expect_shape,
    fail_argument,
    label_pair,
)
from zsseg_rt.ops._overlap import expect_apart
from zsseg_rt.ops.reference_blend import blend_cosines
from zsseg_rt.ops.reference_labels import (
    UPSAMPLE_ARGMAX_TOLERANCE,
    activate,
    upsample_argmax,
    upsample_bilinear,
)
from zsseg_rt.ops.reference_preprocess import preprocess
from zsseg_rt.ops.reference_regions import crop_regions, label_regions, mask_boxes
from zsseg_rt.ops.reference_warp import warp_blend

__all__ = [
    "UPSAMPLE_ARGMAX_TOLERANCE",
    "activate",
    "all_finite",
    "blend_cosines",
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
    cls_embed = expect_array("cls_embed", cls_embed)
    text_embeds, weight, bias = _text_half_arrays(text_embeds, weight, bias)
    num_classes, embed_dim = text_embeds.shape
    expect_array("cls_embed", cls_embed, text_embeds.dtype.name)
    expect_shape("cls_embed", cls_embed, (ANY, embed_dim))
    text, weights = text_embeds.astype(np.float32), weight.astype(np.float32)
    if text_queries is None:
        text_half = text @ weights[:, embed_dim:].T + bias
    else:
        text_half = expect_array("text_queries", text_queries, "float32")
        expect_shape("text_queries", text_half, (num_classes, weight.shape[0]))
    shape = (cls_embed.shape[0], num_classes, weight.shape[0])
    inputs = {"cls_embed": cls_embed, "text_embeds": text_embeds, "weight": weight, "bias": bias}
    expect_apart({"out": out}, {**inputs, "text_queries": text_queries})
    result = _descriptor_out(out, shape, text_embeds.dtype)

    related = cls_embed.astype(np.float32)[:, None, :] * text
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
    text_embeds, weight, bias = _text_half_arrays(text_embeds, weight, bias)
    num_classes, embed_dim = text_embeds.shape
    expect_apart({"out": out}, {"text_embeds": text_embeds, "weight": weight, "bias": bias})
    result = _descriptor_out(out, (num_classes, weight.shape[0]), text_embeds.dtype)
    text, weights = text_embeds.astype(np.float32), weight.astype(np.float32)
    result[...] = text @ weights[:, embed_dim:].T + bias
    return result


def _descriptor_out(
    out: Array | None, shape: tuple[int, ...], embeds: np.dtype[Any]
) -> npt.NDArray[Any]:
    """The caller's array may also be of the embeddings' dtype."""
    allowed = list(dict.fromkeys(("float32", embeds.name)))
    result = expect_array("out", np.empty(shape, np.float32) if out is None else out)
    if result.dtype.name in allowed:
        return expect_out("out", result, shape, result.dtype)
    expect_dtype("out", result, *allowed)
    return result


def _text_half_arrays(
    text_embeds: Array, weight: Array, bias: Array
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    text_embeds = expect_array("text_embeds", text_embeds)
    weight = expect_array("weight", weight)
    bias = expect_array("bias", bias)
    expect_array("text_embeds", text_embeds, "float32", "float16", "bfloat16")
    expect_shape("text_embeds", text_embeds, (ANY, ANY))
    expect_array("weight", weight, text_embeds.dtype.name)
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
    expect_array("patch_embeds", patch_embeds, "float32", "float16", "bfloat16")
    expect_shape("patch_embeds", patch_embeds, (ANY, ANY, ANY))
    beside = patch_embeds.dtype.name
    others = ("float16", "bfloat16") if beside == "float32" else (beside,)
    expect_array("text_embeds", text_embeds, "float32", *others)
    batch, num_patches, embed_dim = patch_embeds.shape
    shared = text_embeds.ndim != 3
    pattern = (ANY, embed_dim) if shared else (batch, ANY, embed_dim)
    expect_shape("text_embeds", text_embeds, pattern)
    if not math.isfinite(logit_scale):
        fail_argument("logit_scale", "a finite number", f"{logit_scale:g}")
    num_classes = text_embeds.shape[-2]
    sizes = (num_patches, num_classes) if classes_last else (num_classes, num_patches)
    inputs = {"patch_embeds": patch_embeds, "text_embeds": text_embeds}
    expect_apart({"out": out, "finite": finite}, inputs)
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
    inputs = {"frame": frame, "labels": labels, "palette": palette}
    expect_apart({"out": out}, inputs, in_place=("frame",))
    result = expect_out("out", out, frame.shape, np.uint8)

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
    expect_shape("frame", expect_array("frame", frame, "uint8"), (ANY, ANY, 3))
    written = {**label_pair(out, bool(rule.get("with_scores"))), "picture": picture}
    tables = {name: rule.get(name) for name in ("seen", "label_table", "num_classes")}
    inputs = {"logits": logits, **tables, "frame": frame, "palette": palette}
    expect_apart(written, inputs, in_place=("frame",))
    labels, scores = upsample_argmax(logits, frame.shape[:2], out=out, **rule)
    if len(labels) != 1:
        raise ShapeError(
            f"logits: expected one image to draw an overlay of, got {len(labels)}. Draw them one "
            "by one."
        )
    return labels, scores, overlay(frame, labels[0], palette, alpha=alpha, out=picture)


def all_finite(
    values: Array, *, out: Array | None = None, stream: int = 0
) -> npt.NDArray[np.uint8]:
    """Reference of :func:`zsseg_rt.ops.all_finite`."""
    values = expect_array("values", values, "float32", "float16", "bfloat16")
    expect_apart({"out": out}, {"values": values})
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
    expect_apart({"out": out}, {"labels": labels})
    result = expect_out("out", out, (num_classes + 1,), np.int64)
    known = labels[labels != np.iinfo(labels.dtype).max]
    result[:-1] = np.bincount(known, minlength=num_classes)[:num_classes]
    result[-1] = labels.size - result[:-1].sum()
    return result
