"""Input checks that several models share."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError


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
