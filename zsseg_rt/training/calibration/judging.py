"""Try settings on what a briefly trained model says about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.errors import DatasetError
from zsseg_rt.models.base import input_image
from zsseg_rt.models.descriptor.model import DescriptorModel
from zsseg_rt.models.functional import patch_text_similarity
from zsseg_rt.text.class_names import split_synonyms
from zsseg_rt.training.assembly import Assembly
from zsseg_rt.training.calibration.candidates import CandidateCounts, Grid, ImageMaps, Maps
from zsseg_rt.training.calibration.held_out import AnnotatedPart


@torch.inference_mode()
def judge(
    parts: Assembly, shown: AnnotatedPart, names: Sequence[int], *, unseen_weights: bool = True
) -> CandidateCounts:
    """Label images with every setting, and count."""
    model = cast(DescriptorModel, parts.task.model).eval()
    grid = Grid() if unseen_weights else replace(Grid(), unseen_weights=(0.0,))
    counts, embeds = _start(parts, model, shown, names, grid)
    table = np.full(shown.ignore_label + 1, len(names), np.int64)
    table[list(names)] = np.arange(len(names))
    for index in range(len(shown)):
        sample = shown[index]
        logits, cosines = grid_maps(model, sample.image, embeds)
        counts.add(ImageMaps(mask_logits=logits, cosines=cosines, labels=table[sample.labels]))
    if not counts.true[~counts.seen].any():
        raise DatasetError(
            f"{shown.name}: expected images that show a name which was held out, got none among "
            f"{len(shown)}. Choose by more images."
        )
    return counts


def _start(
    parts: Assembly,
    model: DescriptorModel,
    shown: AnnotatedPart,
    names: Sequence[int],
    grid: Grid,
) -> tuple[CandidateCounts, Tensor]:
    """Empty counts, and the embeddings of the offered names' phrases."""
    assert parts.embeddings is not None
    groups = split_synonyms(shown.class_names)
    places = {row: place for place, row in enumerate(names)}
    owners = [places.get(row, -1) for row, group in enumerate(groups) for _ in group]
    chosen = torch.tensor([owner >= 0 for owner in owners])
    counts = CandidateCounts(
        grid=grid,
        classes=np.asarray([owner for owner in owners if owner >= 0], np.int64),
        shares=tuple(1.0 / len(groups[row]) for row in names for _ in groups[row]),
        seen=np.asarray([row in shown.seen for row in names]),
        activation=model.config.score_activation,
        own_bias=model.config.seen_bias,
    )
    return counts, parts.embeddings.phrase_embeds[chosen].to(next(model.parameters()))


def grid_maps(
    model: DescriptorModel, rgb: npt.NDArray[np.uint8], embeds: Tensor
) -> tuple[Maps, Maps]:
    """Mask logits and cosines of an image at the patch grid, float32 ``[P, gh, gw]``."""
    output = model(input_image(model, rgb, embeds.device), embeds)
    patches = output.patch_embeds.flatten(2).transpose(1, 2)
    cosines = patch_text_similarity(patches, embeds).reshape(output.mask_logits.shape)
    return _grid(output.mask_logits), _grid(cosines)


def _grid(maps: Tensor) -> Maps:
    return np.asarray(maps[0].float().cpu().numpy(), np.float32)
