"""The model of a training run as a segmenter to evaluate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, DeviceError, ShapeError, VocabularyError
from zsseg_rt.models.base import SegmentationModel, SlideSettings
from zsseg_rt.models.registry import ARCHITECTURES
from zsseg_rt.text.class_names import ClassList, join_synonyms, split_synonyms
from zsseg_rt.torch_files.checkpoints import hash_weights
from zsseg_rt.training.class_embeddings import embed_phrases, region_embeddings
from zsseg_rt.training.trained.card import TrainedClasses, load_classes, load_trained

_DEFAULT_TEMPLATES = ("a photo of a {}.",)


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


class TorchSegmenter:
    """Labels images with any of our models.

    Protocol ``"whole"`` is :meth:`zsseg_rt.models.base.SegmentationModel.label`: for most models
    the runtime's method, from which a bundle's engine differs only by export and precision; for
    ZegFormer the official evaluation. Protocol ``"slide"`` is the official evaluation of the
    others, :meth:`zsseg_rt.models.base.SegmentationModel.slide`.

    Shapes:
        text_embeds: Embeddings of all phrases in order, ``[P, D]``, unit norm.

    Attributes:
        class_names: As given.
    """

    def __init__(
        self,
        model: SegmentationModel,
        class_names: Sequence[str],
        text_embeds: Tensor,
        *,
        region_embeds: Tensor | None = None,
        seen_names: Collection[str] = (),
        protocol: str = "whole",
        windows: SlideSettings | None = None,
    ) -> None:
        if getattr(model, "architecture", None) not in ARCHITECTURES:
            raise ArgumentError(
                f"model: expected one of {', '.join(ARCHITECTURES)}, got {type(model).__name__}. "
                "Export it to a bundle and evaluate that."
            )
        if model.training:
            raise ArgumentError(
                "model: expected evaluation mode, got training mode. Call model.eval() first."
            )
        check_choice("protocol", protocol, ("whole", "slide") if model.windows else ("whole",))
        self._phrases = Phrases(class_names, seen_names, merged=model.averages_synonyms)
        self._device = next(model.parameters()).device
        self._text_embeds = self._rows("text_embeds", text_embeds)
        self._region_embeds = None
        if region_embeds is not None:
            self._region_embeds = self._rows("region_embeds", region_embeds)
        self._model = model.with_seen(self._phrases.seen_rows)
        self._windows = None if protocol == "whole" else windows or model.windows
        self.class_names = self._phrases.class_names

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        if self._windows is None:
            labels = self._model.label(image, self._text_embeds, self._region_embeds)
        else:
            labels = self._model.slide(image, self._text_embeds, self._windows)
        return self._phrases.to_classes(labels.cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device, as plain data."""
        dtype = next(self._model.parameters()).dtype
        description: dict[str, Any] = {
            "kind": "torch",
            "architecture": self._model.architecture,
            "sha256": hash_weights(self._model),
            "device": str(self._device),
            "precision": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "protocol": "whole" if self._windows is None else "slide",
        }
        if self._windows is not None:
            description["windows"] = vars(self._windows)
        return description | self._model.describe_input()

    def _rows(self, name: str, embeds: Tensor) -> Tensor:
        return self._phrases.rows(name, embeds.to(self._device, torch.float32))


def trained_segmenter(
    path: str | Path,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    protocol: str = "whole",
    device: str = "auto",
) -> TorchSegmenter:
    """Load a run's model and the embeddings of any classes.

    Phrases that the run was trained with keep the run's embeddings, unless templates are given;
    others are embedded by the model's text tower. Scores of the run's seen classes are lowered as
    the model specifies.
    """
    model, known = load_trained(path), load_classes(path)
    phrases = [phrase for synonyms in split_synonyms(class_names) for phrase in synonyms]
    embeds = _embed(model, phrases, known, templates)
    classes = None if known is None else known[0]
    return TorchSegmenter(
        model.to(_find_device(device)),
        class_names,
        embeds,
        region_embeds=region_embeddings(
            model, class_names, () if classes is None else classes.region_templates
        ),
        seen_names=() if classes is None else classes.lowered_phrases,
        protocol=protocol,
    )


def _find_device(name: str) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(
            f"device: expected one of {count} GPUs that torch can use, got {name}. Use cpu."
        )
    return device


def _embed(
    model: nn.Module,
    phrases: Sequence[str],
    known: tuple[TrainedClasses, Tensor] | None,
    templates: Sequence[str] | None,
) -> Tensor:
    rows: dict[str, Tensor] = {}
    if known is not None and templates is None:
        rows = dict(zip(known[0].phrases, known[1], strict=True))
    missing = [phrase for phrase in phrases if phrase not in rows]
    if missing:
        tower = getattr(model, "text_encoder", None)
        if tower is None:
            raise VocabularyError(
                f"class_names: expected names that the run was trained with, got {missing[0]!r}; "
                "its model has no text tower. Rename the class, or train with one."
            )
        used = templates or (_DEFAULT_TEMPLATES if known is None else known[0].templates)
        rows |= dict(zip(missing, embed_phrases(tower, missing, used), strict=True))
    return torch.stack([rows[phrase] for phrase in phrases])
