"""From a training run to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from zsseg_rt.export.families import export_bundle
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zegformer_prompts import REGION_TEMPLATES
from zsseg_rt.training.class_embeddings import region_embeddings
from zsseg_rt.training.trained import (
    TrainedClasses,
    find_checkpoint,
    load_classes,
    load_trained,
    with_seen_classes,
)

__all__ = ["export_trained"]


def export_trained(run: str | Path, path: str | Path, **options: Any) -> Path:
    """Write the model of a training run as a bundle.

    The bundle knows the classes of the training data by their embeddings (its text bank), so that
    it needs no text encoder for them, and lowers the scores of the seen ones as training says.

    Args:
        run: A run's folder (its best checkpoint is taken), or a checkpoint's.
        path: Folder to write, ``NAME.zsseg``.
        **options: Of :func:`zsseg_rt.export.export_bundle`, where they are to differ.

    Returns:
        The bundle folder.

    Raises:
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: There is no checkpoint, it is damaged, or its model cannot be exported.
    """
    model, known = load_trained(run), load_classes(run)
    checkpoint = find_checkpoint(run)
    settings: dict[str, Any] = {"source": f"trained by zsseg_rt, {checkpoint.name}", "space": ""}
    if known is not None:
        classes, embeds = known
        seen = set(classes.seen_phrases) if classes.counts_as_unseen else set()
        rows = [index for index, phrase in enumerate(classes.phrases) if phrase in seen]
        with_seen_classes(model, rows, self_trained=classes.protocol == "transductive")
        settings |= {
            "class_names": classes.phrases,
            "templates": classes.templates,
            "space": classes.space,
            "text_bank": (classes.phrases, embeds.numpy()),
        }
        settings |= _region_settings(model, classes, embeds)
    return export_bundle(model, path, **settings | options)


def _region_settings(model: nn.Module, classes: TrainedClasses, embeds: Tensor) -> dict[str, Any]:
    """What a ZegFormer's bundle needs besides: the prompts and embeddings of its second look."""
    if not isinstance(model, ZegFormer):
        return {}
    templates = classes.region_templates or REGION_TEMPLATES
    regions = region_embeddings(model, classes.names, templates)
    rows = embeds if regions is None else np.stack([embeds.numpy(), regions.numpy()])
    return {
        "region_templates": templates,
        "text_bank": (classes.phrases, np.asarray(rows)),
        "size_hw": (model.config.image_size, model.config.image_size),
    }
