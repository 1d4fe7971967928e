"""What every data set gives, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sample", "SegmentationDataset", "ignore_label"]

LabelMap = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Sample:
    """One picture and its annotation.

    Attributes:
        image: RGB, uint8 ``[H, W, 3]``.
        labels: Class indices, uint8 ``[H, W]`` (uint16 above 254 classes); the data set's
            ``ignore_label`` where nothing is annotated.
        name: What the picture is called in messages and result files.
    """

    image: NDArray[np.uint8]
    labels: LabelMap
    name: str


@runtime_checkable
class SegmentationDataset(Protocol):
    """Annotated pictures by index.

    Label maps always hold all classes, unseen ones too: what training may look at is the
    protocol's business, not the data's.

    Attributes:
        name: For messages and result files.
        class_names: One phrase a class; commas separate synonyms.
        seen: Indices of the classes whose annotations training may use, ascending. All others are
            unseen.
        ignore_label: 255, or 65535 above 254 classes.
    """

    name: str
    class_names: tuple[str, ...]
    seen: tuple[int, ...]
    ignore_label: int

    def __len__(self) -> int:
        """Number of pictures."""

    def __getitem__(self, index: int) -> Sample:
        """Read one picture and its labels.

        Raises:
            DatasetError: A file is missing or unreadable, its sizes differ, or the annotation
                holds a value that is no class.
            IndexError: There is no such picture.
        """


def ignore_label(num_classes: int) -> int:
    """The label of unannotated pixels for so many classes: 255, or 65535 above 254 classes."""
    return 255 if num_classes <= 254 else 65535
