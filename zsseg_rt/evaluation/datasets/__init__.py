"""Segmentation data sets by name: images, label maps, and which classes are seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsseg_rt.common.checks import check_choice
from zsseg_rt.common.schema import checked_settings
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.evaluation.datasets.folder import PhotoDataset, folder
from zsseg_rt.evaluation.datasets.published import PUBLISHED, open_published

__all__ = ["DATASETS", "Sample", "SegmentationDataset", "create_dataset"]

_OTHERS: dict[str, Callable[..., Any]] = {"folder": folder, "photos": PhotoDataset}

DATASETS = tuple(sorted({*PUBLISHED, *_OTHERS}))
"""Names that :func:`create_dataset` knows."""


def create_dataset(
    name: str, root: str | Path | None = None, split: str = "train", **options: Any
) -> SegmentationDataset:
    """Open a data set.

    Args:
        name: One of :data:`DATASETS`.
        root: Folder of the data set.
        split: For most, ``"train"`` or ``"val"``; see docs/datasets.md.
        **options: Its options: ``unseen`` (names of the unseen classes); for all published ones,
            ``partial``; ``convention`` for VOC and COCO-Stuff; ``background`` for Context;
            ``class_names``, ``values``, ``zero_is_unlabelled`` for folders.

    Raises:
        ArgumentError: There is no such data set, split or option, or an option's value is of
            another type.
        DatasetError: Its files are missing or inconsistent; the message says what to download.
    """
    check_choice("name", name, DATASETS)
    factory: Callable[..., Any] = open_published if name in PUBLISHED else _OTHERS[name]
    hidden = () if name not in PUBLISHED else PUBLISHED[name].lacks
    options = checked_settings(factory, options, f"options of {name}", hidden)
    if root is None:
        raise ArgumentError(f"root: expected the folder of {name}, got None. Say where it is.")
    place = (name, root) if name in PUBLISHED else (root,)
    dataset: SegmentationDataset = factory(*place, split, **options)
    return dataset
