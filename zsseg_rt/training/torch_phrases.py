"""What every torch segmenter needs: phrases and their classes, and a description of the model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.text.tokenizer import clean_text
from zsseg_rt.training.class_phrases import join_synonyms, split_synonyms

__all__ = [
    "Phrases",
    "check_evaluation_mode",
    "describe_model",
    "hash_tensors",
    "hash_weights",
    "with_seen_rows",
]


class Phrases:
    """Which phrases stand for which class, and which of them training saw.

    Args:
        class_names: One phrase a class; commas separate synonyms.
        seen_names: Phrases that training saw.

    Attributes:
        class_names: As given, spaces tidied.
        phrases: All phrases, class by class.
        seen_rows: Indices of the phrases that training saw.
        seen_classes: Indices of the classes of which training saw a phrase.
    """

    def __init__(self, class_names: Sequence[str], seen_names: Collection[str]) -> None:
        classes = split_synonyms(class_names)
        self.class_names = join_synonyms(classes)
        self.phrases = [phrase for synonyms in classes for phrase in synonyms]
        seen = {clean_text(name) for name in seen_names}
        self.seen_rows = tuple(i for i, x in enumerate(self.phrases) if clean_text(x) in seen)
        self._counts = [len(synonyms) for synonyms in classes]
        owners = [index for index, synonyms in enumerate(classes) for _ in synonyms]
        self.seen_classes = tuple(sorted({owners[row] for row in self.seen_rows}))
        unknown = 255 if len(classes) <= 254 else 65535
        # One entry more: whatever lies beyond the phrases is unknown.
        self._table = np.array([*owners, unknown], np.uint8 if unknown == 255 else np.uint16)

    def check_embeds(self, name: str, embeds: Tensor) -> None:
        """Refuse anything but one row a phrase."""
        if embeds.ndim != 2 or len(embeds) != len(self.phrases):
            raise ShapeError(
                f"{name}: expected one row for each of {len(self.phrases)} phrases, got "
                f"{list(embeds.shape)}. Embed every synonym, class by class."
            )

    def seen_mask(self, device: torch.device) -> Tensor:
        """Which phrases training saw, bool ``[P]``."""
        mask = torch.zeros(len(self.phrases), dtype=torch.bool, device=device)
        mask[list(self.seen_rows)] = True
        return mask

    def class_embeds(self, embeds: Tensor) -> Tensor:
        """One row a class, unit norm, ``[C, D]``: the mean of its phrases' rows ``[P, D]``."""
        means = torch.stack([rows.mean(dim=0) for rows in torch.split(embeds, self._counts)])
        return torch.nn.functional.normalize(means, dim=-1)

    def to_classes(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Class indices of phrase indices; indices of no phrase become unknown."""
        labels = np.where(labels < 0, len(self.phrases), labels)
        classes: npt.NDArray[Any] = self._table[np.minimum(labels, len(self.phrases))]
        return classes


def with_seen_rows(model: Any, rows: tuple[int, ...]) -> Any:
    """The same model and weights, with the seen classes of another vocabulary; a new object."""
    if not hasattr(model.config, "seen_classes"):
        return model
    twin = copy.copy(model)
    twin.config = replace(model.config, seen_classes=rows)
    return twin


def describe_model(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Architecture, hash of the weights, device and precision, as plain data."""
    return {
        "kind": "torch",
        "architecture": getattr(model, "architecture", type(model).__name__.lower()),
        "sha256": hash_weights(model),
        "device": str(device),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all tensors of the ``state_dict`` with their names, in hex."""
    return hash_tensors(model.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, in hex; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_evaluation_mode(model: nn.Module) -> None:
    """Refuse a model whose dropout is on.

    Raises:
        ArgumentError: The model is in training mode.
    """
    if model.training:
        raise ArgumentError(
            "model: expected evaluation mode, got training mode. Call model.eval() first."
        )
