"""The model of a training run as a segmenter to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt.errors import DeviceError, VocabularyError
from zsseg_rt.text.class_names import split_synonyms
from zsseg_rt.training.class_embeddings import embed_phrases, region_embeddings
from zsseg_rt.training.segmenters.torch_segmenter import TorchSegmenter
from zsseg_rt.training.trained.card import TrainedClasses, load_classes, load_trained

_DEFAULT_TEMPLATES = ("a photo of a {}.",)


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
    region_templates = () if known is None else known[0].region_templates
    seen: tuple[str, ...] = ()
    if known is not None and known[0].counts_as_unseen:
        seen = known[0].seen_phrases
    return TorchSegmenter(
        model.to(_find_device(device)),
        class_names,
        embeds,
        region_embeds=region_embeddings(model, class_names, region_templates),
        seen_names=seen,
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
        used = templates or (_DEFAULT_TEMPLATES if known is None else known[0].templates)
        tower = _text_tower(model, missing)
        rows |= dict(zip(missing, embed_phrases(tower, missing, used), strict=True))
    return torch.stack([rows[phrase] for phrase in phrases])


def _text_tower(model: nn.Module, phrases: Sequence[str]) -> Any:
    tower = getattr(model, "text_encoder", None)
    if tower is None:
        raise VocabularyError(
            f"class_names: expected names that the run was trained with, got {phrases[0]!r}; its "
            "model has no text tower. Rename the class, or train with one."
        )
    return tower
