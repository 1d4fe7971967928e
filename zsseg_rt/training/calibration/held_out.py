"""Names and images that are held out of a brief training, and nothing that is truly unseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.evaluation.datasets.base import Sample

LEAST_NAMES = 4
"""A quarter of fewer names is no name."""


class AnnotatedPart:
    """Some images of a data set, with the labels of some classes and of no other.

    Implements :class:`~zsseg_rt.evaluation.datasets.SegmentationDataset`.

    Attributes:
        images: As given.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        images: Sequence[int],
        *,
        annotated: Sequence[int],
        seen: Sequence[int],
    ) -> None:
        self.name, self.class_names = dataset.name, dataset.class_names
        self.ignore_label, self.seen = dataset.ignore_label, tuple(sorted(seen))
        self._dataset, self.images = dataset, tuple(images)
        dtype = label_dtype(len(self.class_names))
        self._table: npt.NDArray[Any] = np.full(65536, self.ignore_label, dtype)
        self._table[list(annotated)] = list(annotated)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Read an image; see :class:`SegmentationDataset`."""
        sample = self._dataset[self.images[index]]
        return Sample(image=sample.image, labels=self._table[sample.labels], name=sample.name)


def draw_names(seen: Sequence[int], folds: int, seed: int) -> list[tuple[int, ...]]:
    """Draw the classes that each fold holds out: a quarter of the seen ones, none twice.

    Returns:
        Indices in ascending order, one tuple for each fold.
    """
    if len(seen) < LEAST_NAMES:
        raise ArgumentError(
            f"data.seen: expected at least {LEAST_NAMES} seen classes, a quarter of which is held "
            f"out, got {len(seen)}. Annotate more, or choose --cosine by other means."
        )
    if not 1 <= folds <= LEAST_NAMES:
        raise ArgumentError(f"folds: expected 1 to {LEAST_NAMES}, got {folds}. Use 2.")
    size = len(seen) // LEAST_NAMES
    order = np.random.default_rng(seed).permutation(np.asarray(seen))
    return [tuple(sorted(order[k * size : (k + 1) * size].tolist())) for k in range(folds)]


def judged_images(length: int, count: int) -> tuple[list[int], list[int]]:
    """Split a data set's images into those to train on and those to choose settings by.

    Returns:
        Indices to train on, and indices to choose by.
    """
    if count < 1:
        raise ArgumentError(f"images: expected at least 1, got {count}. Choose more.")
    if length < 2:
        raise ArgumentError(f"data: expected at least 2 images, got {length}. Add some.")
    count = min(count, length // 2)
    judged = [index * length // count for index in range(count)]
    taken = set(judged)
    return [index for index in range(length) if index not in taken], judged


def shown_classes(dataset: SegmentationDataset, images: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which classes each image shows, by its labels, bool ``[images, C]``; reads every image."""
    shown = np.zeros((len(images), len(dataset.class_names)), bool)
    for place, index in enumerate(images):
        found = np.unique(dataset[index].labels.astype(np.int64))
        shown[place, found[found < shown.shape[1]]] = True
    return shown
