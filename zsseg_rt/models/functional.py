"""Kernels in torch, as used in training; differentiable where that makes sense.

Names, arguments, shapes and meanings are those of :mod:`zsseg_rt.ops.reference`;
``out`` and ``stream`` do not apply.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError

Align = Literal["half_pixel", "corners"]


def preprocess(
    frame: Tensor,
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: Literal["rgb", "bgr"] = "rgb",
    align: Align = "half_pixel",
) -> Tensor:
    """Resize (bilinear, no antialiasing), divide by 255 and normalise a frame.

    Returns:
        RGB planes, float32 ``[3, h, w]``.
    """
    planes = frame.permute(2, 0, 1).float()
    if channel_order == "bgr":
        planes = planes.flip(0)
    resized = F.interpolate(
        planes[None], size=size_hw, mode="bilinear", align_corners=align == "corners"
    )[0]
    offset = torch.tensor(mean, device=frame.device).view(3, 1, 1)
    scale = torch.tensor(std, device=frame.device).view(3, 1, 1)
    return (resized / 255 - offset) / scale


def describe(cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
    """Relate an image to every class: ``[cls * text, text]``.

    Returns:
        ``[B, C, 2 * D]``.
    """
    products = cls_embed[:, None] * text_embeds
    return torch.cat([products, text_embeds.expand_as(products)], dim=-1)


def relationship_descriptor(
    cls_embed: Tensor, text_embeds: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Make class queries: ``[cls * text, text] @ weight.T + bias``.

    Returns:
        ``[B, C, E]``.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023, Relationship Descriptor.
    """
    return F.linear(describe(cls_embed, text_embeds), weight, bias)


def patch_text_similarity(
    patch_embeds: Tensor,
    text_embeds: Tensor,
    *,
    logit_scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Compare every patch with every class: ``logit_scale * text @ patches.T``.

    Returns:
        ``[B, C, N]``.
    """
    if normalize:
        patch_embeds = F.normalize(patch_embeds, dim=-1)
        text_embeds = F.normalize(text_embeds, dim=-1)
    return logit_scale * (text_embeds @ patch_embeds.transpose(1, 2))


def upsample_argmax(
    logits: Tensor,
    out_hw: tuple[int, int],
    *,
    activation: Literal["none", "sigmoid", "softmax"] = "none",
    seen: Tensor | None = None,
    seen_bias: float = 0.0,
    unknown_below: float | None = None,
    with_scores: bool = False,
    align: Align = "half_pixel",
) -> tuple[Tensor, Tensor | None]:
    """Label every pixel: upsample, activate, lower seen classes, pick the best.

    A class that is NaN or minus infinity at a pixel never wins it; a pixel with no other class
    is unknown.

    Returns:
        Labels ``[B, H, W]``, uint8 with 255 for unknown (above 254 classes int32 with 65535), and
        scores ``[B, H, W]`` or None: the winner's activated value without the bias.
    """
    nothing = float("-inf")
    values = F.interpolate(logits, size=out_hw, mode="bilinear", align_corners=align == "corners")
    values = values.masked_fill(values.isnan(), nothing)
    activated = _activate(values, activation)
    shifted = activated
    if seen is not None:
        shifted = activated - seen_bias * seen.to(values).view(-1, 1, 1)
    winners = shifted.masked_fill(values == nothing, nothing).argmax(dim=1)
    scores = activated.gather(1, winners.unsqueeze(1)).squeeze(1)
    unknown = (values == nothing).all(dim=1)
    if unknown_below is not None:
        unknown |= scores < unknown_below
    narrow = label_dtype(logits.shape[1])
    labels = winners.to(torch.uint8 if narrow.itemsize == 1 else torch.int32)
    labels.masked_fill_(unknown, int(np.iinfo(narrow).max))
    return labels, scores if with_scores else None


def _activate(values: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return values.sigmoid()
    if activation == "softmax":
        return values.softmax(dim=1).nan_to_num(nan=0.0)  # a pixel with no class
    return values


def overlay(frame: Tensor, labels: Tensor, palette: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Blend each pixel with its class colour; pixels without a colour keep the frame's.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    indices, unknown = labels.long(), 255 if labels.dtype == torch.uint8 else 65535
    known = ((indices < len(palette)) & (indices != unknown)).unsqueeze(-1)
    colours = palette[indices.clamp(max=len(palette) - 1)].int()
    weight = int(alpha * 65536 + 0.5)  # fixed point: bit-exact everywhere
    blended = (frame.int() * (65536 - weight) + colours * weight + 32768) >> 16
    return torch.where(known, blended.to(torch.uint8), frame)


def check_tensor(name: str, value: Any) -> None:
    """Refuse anything that is not a tensor."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise DTypeError(
            f"{name}: expected a torch.Tensor, got {kind}. Convert it with torch.as_tensor."
        )


def check_text_embeds(text_embeds: Tensor, embed_dim: int, name: str = "text_embeds") -> None:
    """Refuse class embeddings that are not from a model's joint space."""
    check_tensor(name, text_embeds)
    if not text_embeds.is_floating_point():
        raise DTypeError(
            f"{name}: expected floats, got {text_embeds.dtype}. Pass embeddings, not tokens."
        )
    if text_embeds.ndim != 2 or text_embeds.shape[1] != embed_dim or not len(text_embeds):
        raise ShapeError(
            f"{name}: expected [C, {embed_dim}] with at least one class, "
            f"got {list(text_embeds.shape)}. Use embeddings of this model's text encoder."
        )


def read_class_indices(name: str, classes: Any) -> tuple[int, ...]:
    """Read class indices from a list, an array or a tensor."""
    try:
        values = list(classes.tolist() if hasattr(classes, "tolist") else classes)
        if not any(isinstance(value, bool) for value in values):
            return tuple(operator.index(value) for value in values)
    except TypeError:
        pass
    raise ArgumentError(
        f"{name}: expected indices of classes such as [0, 1, 4], got {classes!r}. "
        "Give the rows of the class embeddings."
    )
