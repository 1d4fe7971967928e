"""Kernels in torch that training differentiates, and checks that models share.

Kernels have the names, arguments and meanings of :mod:`zsseg_rt.ops.reference`.
"""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError


def describe(cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
    """Relate an image to every class: ``[cls * text, text]``, ``[B, C, 2 * D]``."""
    products = cls_embed[:, None] * text_embeds
    return torch.cat([products, text_embeds.expand_as(products)], dim=-1)


def relationship_descriptor(
    cls_embed: Tensor, text_embeds: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Make class queries ``[B, C, E]``: ``[cls * text, text] @ weight.T + bias``."""
    return F.linear(describe(cls_embed, text_embeds), weight, bias)


def patch_text_similarity(
    patch_embeds: Tensor,
    text_embeds: Tensor,
    *,
    logit_scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Compare every patch with every class: ``logit_scale * text @ patches.T``, ``[B, C, N]``."""
    if normalize:
        patch_embeds = F.normalize(patch_embeds, dim=-1)
        text_embeds = F.normalize(text_embeds, dim=-1)
    return logit_scale * (text_embeds @ patch_embeds.transpose(1, 2))


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


def shared_fields(settings: Any, config: type[Any]) -> dict[str, Any]:
    """The settings with the names of a configuration's fields; None leaves a field's default."""
    names = (field.name for field in fields(config))
    values: dict[str, Any] = {name: getattr(settings, name, None) for name in names}
    if hasattr(settings, "seen_classes"):
        values["seen_classes"] = read_class_indices("seen_classes", settings.seen_classes)
    if values.get("templates") is not None:
        values["templates"] = tuple(values["templates"])
    return {name: value for name, value in values.items() if value is not None}


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
