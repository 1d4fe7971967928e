"""What every torch segmenter needs: phrases and their classes, and a description of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.text.class_names import ClassList, join_synonyms, split_synonyms


class Phrases:
    """Which phrases stand for which class, and which rows of the embeddings training saw.

    Attributes:
        class_names: As given, with whitespace cleaned up.
        seen_rows: Indices of the rows that training saw.
    """

    def __init__(
        self, class_names: Sequence[str], seen_names: Collection[str], *, merged: bool = False
    ) -> None:
        groups = split_synonyms(class_names)
        self.class_names = join_synonyms(groups)
        self._classes = ClassList.of_groups(groups)
        self._counts = [len(synonyms) for synonyms in groups] if merged else None
        seen = self._classes.seen(seen_names)
        rows = np.flatnonzero(np.zeros(0) if seen is None else seen)
        rows = np.unique(self._classes.phrase_classes[rows]) if merged else rows
        self.seen_rows = tuple(rows.tolist())

    def rows(self, name: str, embeds: Tensor) -> Tensor:
        """What a model compares: the embeddings of all phrases, or the means of each class's.

        Shapes:
            embeds: One row per phrase, class by class, ``[P, D]``.
        """
        if embeds.ndim != 2 or len(embeds) != len(self._classes.phrases):
            raise ShapeError(
                f"{name}: expected one row for each of {len(self._classes.phrases)} phrases, got "
                f"{list(embeds.shape)}. Embed every synonym, class by class."
            )
        if self._counts is None:
            return embeds
        means = torch.stack([rows.mean(dim=0) for rows in torch.split(embeds, self._counts)])
        return torch.nn.functional.normalize(means, dim=-1)

    def to_classes(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Class indices of row indices; -1 and indices beyond the rows become unknown."""
        if self._counts is not None:
            return labels.astype(label_dtype(len(self._counts)))
        classes: npt.NDArray[Any] = self._classes.label_table[labels]
        return classes


def describe_model(model: SegmentationModel, device: torch.device) -> dict[str, Any]:
    """Architecture, hash of the weights, device and precision, as plain data."""
    return {
        "kind": "torch",
        "architecture": model.architecture,
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
    """Refuse a model whose dropout is on."""
    if model.training:
        raise ArgumentError(
            "model: expected evaluation mode, got training mode. Call model.eval() first."
        )
