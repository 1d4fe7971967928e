"""From a training run to a bundle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zsseg_rt.export.exporters import export_bundle
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.training.class_embeddings import region_embeddings
from zsseg_rt.training.trained.card import (
    TrainedClasses,
    find_checkpoint,
    load_classes,
    load_trained,
    share_of_top_class,
)

_log = logging.getLogger(__name__)

_NEARLY_ALL = 98.0  # percent of the evaluation's pixels


def export_trained(run: str | Path, path: str | Path, **options: Any) -> Path:
    """Write the model of a training run as a bundle.

    The bundle knows the classes of the training data by their embeddings (its text bank), so that
    it needs no text encoder for them, and lowers the scores of the seen ones as training specified.
    A warning tells if the checkpoint gave nearly all pixels of its evaluation to one class.

    Returns:
        The bundle folder.
    """
    model, known = load_trained(run), load_classes(run)
    settings: dict[str, Any] = {
        "source": f"trained by zsseg_rt, {find_checkpoint(run).name}",
        "space": "",
        "size_hw": model.size_hw,
    }
    if known is not None:
        classes, embeds = known
        seen = set(classes.seen_phrases) if classes.counts_as_unseen else set()
        rows = [index for index, phrase in enumerate(classes.phrases) if phrase in seen]
        model = model.with_seen(rows, self_trained=classes.protocol == "transductive")
        settings |= {
            "class_names": classes.phrases,
            "templates": classes.templates,
            "space": classes.space,
            "text_bank": (classes.phrases, embeds.numpy()),
        }
        if model.text_space:
            model.text_space = classes.space
        settings |= _region_settings(model, classes, embeds)
    written = export_bundle(model, path, **settings | options)
    _warn_of_one_class(run)
    return written


def _warn_of_one_class(run: str | Path) -> None:
    share = share_of_top_class(run)
    if share is not None and share >= _NEARLY_ALL:
        _log.warning(
            "%s: gives one class %.1f %% of the pixels of its evaluation. It has learned nothing "
            "useful unless the images show little else: train longer, from a better start, or "
            "look at the run's pictures.",
            find_checkpoint(run),
            share,
        )


def _region_settings(
    model: SegmentationModel, classes: TrainedClasses, embeds: Tensor
) -> dict[str, Any]:
    """The prompts and embeddings for classifying regions, if the model does so."""
    regions = region_embeddings(model, classes.names, classes.region_templates)
    if regions is None:
        return {}
    return {
        "region_templates": classes.region_templates or model.region_templates,
        "text_bank": (classes.phrases, np.stack([embeds.numpy(), regions.numpy()])),
    }
