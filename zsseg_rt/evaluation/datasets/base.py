"""What every data set provides, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.arrays import label_dtype

LabelMap = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Sample:
    """One image and its annotation.

    Attributes:
        image: RGB, uint8 ``[H, W, 3]``.
        labels: Class indices, uint8 ``[H, W]`` (uint16 above 254 classes); the data set's
            ``ignore_label`` where nothing is annotated.
        name: What the image is called in messages and result files.
    """

    image: NDArray[np.uint8]
    labels: LabelMap
    name: str


@runtime_checkable
class SegmentationDataset(Protocol):
    """Annotated images by index.

    Label maps always hold all classes, including unseen ones: what training may look at is up to
    the protocol, not the data.

    Attributes:
        name: For messages and result files.
        class_names: One phrase per class; commas separate synonyms.
        seen: Indices of the classes whose annotations training may use, ascending. All others are
            unseen.
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
