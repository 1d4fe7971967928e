"""Data sets: images with labels by index, classes, and a look at all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.errors import DatasetError

LabelMap = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Sample:
    """One image and its annotation."""

    image: NDArray[np.uint8]  # RGB, uint8 [H, W, 3]
    # Class indices, uint8 [H, W] (uint16 above 254 classes); the data set's ignore_label where
    # nothing is annotated
    labels: LabelMap
    name: str  # What the image is called in messages and result files


@runtime_checkable
class SegmentationDataset(Protocol):
    """Annotated images by index, whose labels always hold all classes, also unseen ones.

    Attributes:
        name: For messages and result files.
        class_names: One phrase per class; commas separate synonyms.
        seen: Indices of the classes whose annotations training may use, ascending.
        ignore_label: 255, or 65535 above 254 classes.
    """

    name: str
    class_names: tuple[str, ...]
    seen: tuple[int, ...]
    ignore_label: int

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its labels.

        Raises:
            DatasetError: A file is missing or unreadable, its sizes differ, or the annotation
                holds a value that is not a class.
            IndexError: There is no such image.
        """


def ignore_label(num_classes: int) -> int:
    """The label of unannotated pixels for a number of classes: 255, or 65535 above 254 classes."""
    return int(np.iinfo(label_dtype(num_classes)).max)


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set, in the order of its labels."""

    names: tuple[str, ...]  # one phrase per class; commas separate synonyms
    values: tuple[int, ...]  # in the masks that training and evaluation read
    seen: tuple[int, ...]  # indices, ascending
    map_values: tuple[int, ...] | None = None  # in the masks as published, where those differ

    @property
    def unseen(self) -> tuple[int, ...]:
        """Indices of the unseen classes, ascending."""
        seen = set(self.seen)
        return tuple(index for index in range(len(self.names)) if index not in seen)

    def pick(self, indices: Sequence[int]) -> ClassTable:
        """The same classes in another order, or some of them."""
        seen = set(self.seen)
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            values=tuple(self.values[index] for index in indices),
            seen=tuple(place for place, index in enumerate(indices) if index in seen),
            map_values=self.map_values and tuple(self.map_values[index] for index in indices),
        )

    def with_unseen(self, unseen: Sequence[str] | None) -> ClassTable:
        """The same classes, split differently."""
        if unseen is None:
            return self
        places: dict[str, int] = {}
        for index, name in enumerate(self.names):
            for phrase in (name, *map(str.strip, name.split(","))):
                places.setdefault(phrase, index)
        if missing := [repr(name) for name in unseen if name not in places]:
            raise DatasetError(
                f"unseen: expected classes of this data set, got {', '.join(missing[:5])}. "
                f"It has {', '.join(self.names[:20])}{' and more' if self.names[20:] else ''}."
            )
        left_out = {places[name] for name in unseen}
        if len(left_out) == len(self.names):
            raise DatasetError("unseen: expected at least one class to stay seen, got all of them.")
        seen = tuple(index for index in range(len(self.names)) if index not in left_out)
        return replace(self, seen=seen)


@dataclass(frozen=True)
class Verification:
    """The result of a full scan of a data set."""

    num_pictures: int  # that were read
    pixels: NDArray[np.int64]  # annotated ones of each class, [C]
    ignored_pixels: int  # without annotation
    absent: tuple[str, ...]  # classes that no image holds
    problems: tuple[str, ...]  # one message per image that cannot be used


def verify_dataset(
    dataset: SegmentationDataset, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read every image and count every class; damaged images are listed and raise nothing."""
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
