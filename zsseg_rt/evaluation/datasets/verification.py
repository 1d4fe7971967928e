"""Read a whole data set: what part of it is usable, and how much of every class it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import SegmentationDataset


@dataclass(frozen=True)
class Verification:
    """What a full scan of a data set found.

    Attributes:
        num_pictures: How many were read.
        pixels: Annotated pixels of each class, int64 ``[C]``.
        ignored_pixels: Pixels without annotation.
        absent: Names of the classes that no image holds.
        problems: One message per image that cannot be used.
    """

    num_pictures: int
    pixels: NDArray[np.int64]
    ignored_pixels: int
    absent: tuple[str, ...]
    problems: tuple[str, ...]


def verify_dataset(
    dataset: SegmentationDataset, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read every image and count every class.

    Returns:
        What was found; damaged images are listed and raise nothing.
    """
    counts = np.zeros(dataset.ignore_label + 1, np.int64)
    problems: list[str] = []
    for index in range(len(dataset)):
        try:
            labels = dataset[index].labels
        except DatasetError as error:
            problems.append(str(error))
        else:
            counts += np.bincount(labels.ravel(), minlength=len(counts))
        if progress is not None:
            progress(index + 1, len(dataset))
    names = dataset.class_names
    pixels = counts[: len(names)]
    return Verification(
        num_pictures=len(dataset) - len(problems),
        pixels=pixels,
        ignored_pixels=int(counts[dataset.ignore_label]),
        absent=tuple(name for name, count in zip(names, pixels, strict=True) if not count),
        problems=tuple(problems),
    )
