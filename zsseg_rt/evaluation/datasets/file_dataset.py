"""Images and masks in files, in any known layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import LabelMap, Sample, ignore_label
from zsseg_rt.evaluation.datasets.reading import Mask, read_mask, read_picture
from zsseg_rt.evaluation.datasets.splits import ClassTable
from zsseg_rt.evaluation.datasets.verification import Verification, verify_dataset

_UNKNOWN = 65534


@dataclass(frozen=True)
class FilePair:
    """A picture, its mask, and what both are called."""

    name: str
    image: Path
    mask: Path


class ValueTable:
    """Turns the values of a mask into class indices.

    ``background`` has the values that are the first class, if several are; its one in ``values``
    is then not read. ``advice`` ends the error for a mask with other values.
    """

    def __init__(
        self,
        values: Sequence[int],
        ignored: Iterable[int] = (255,),
        background: Sequence[int] = (),
        advice: str = "Fix the mask, or name the missing classes.",
    ) -> None:
        self._advice = advice
        self.values = tuple(values)
        self.ignored = tuple(ignored)
        self._ignore = ignore_label(len(self.values))
        self._dtype = label_dtype(len(self.values))
        self._table = np.full(65536, _UNKNOWN, np.uint16)
        self._table[list(self.ignored)] = self._ignore
        self._table[list(background)] = 0
        first = 1 if background else 0
        self._table[list(self.values[first:])] = np.arange(first, len(self.values))

    def __call__(self, mask: Mask, path: Path) -> LabelMap:
        """Turn values into indices."""
        labels: NDArray[np.uint16] = (
            self._table[:256][mask] if mask.itemsize == 1 else self._table[mask]
        )
        if labels.size and np.max(labels) >= _UNKNOWN:
            unknown = np.unique(mask[labels == _UNKNOWN])
            if len(unknown):
                raise DatasetError(
                    f"{path}: expected values {_ranges(self.values)} for the "
                    f"{len(self.values)} classes and {_ranges(self.ignored)} for unannotated "
                    f"pixels, got {', '.join(map(str, unknown[:8]))}. {self._advice}"
                )
        indices: NDArray[Any] = labels.astype(self._dtype, copy=False)
        return indices


class FileDataset:
    """Pictures and masks in files; a :class:`~zsseg_rt.evaluation.datasets.SegmentationDataset`."""

    def __init__(
        self,
        name: str,
        table: ClassTable,
        pairs: Sequence[FilePair],
        labels_of: Callable[[Mask, Path], LabelMap],
        read: Callable[[Path], Mask] = read_mask,
    ) -> None:
        with needs_extra("data", "to read masks"):  # before anything is read
            from PIL import Image as _  # noqa: F401
        self.name = name
        self.table = table
        self.class_names = table.names
        self.seen = table.seen
        self.ignore_label = ignore_label(len(table.names))
        self.pairs = tuple(pairs)
        self._labels_of = labels_of
        self._read = read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its labels."""
        pair = self.pairs[index]
        image = read_picture(pair.image)
        mask = self._read(pair.mask)
        if mask.shape[:2] != image.shape[:2]:
            raise DatasetError(
                f"{pair.mask}: expected the {image.shape[1]}x{image.shape[0]} pixels of "
                f"{pair.image.name}, got {mask.shape[1]}x{mask.shape[0]}. Make both the same size; "
                "a photo with an EXIF rotation counts as rotated."
            )
        return Sample(image=image, labels=self._labels_of(mask, pair.mask), name=pair.name)

    @property
    def palette(self) -> NDArray[np.uint8] | None:
        """The customary colours, uint8 ``[C, 3]``, if the data set has any."""
        return self.table.palette

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every image and count every class."""
        return verify_dataset(self, progress)


def _ranges(values: Sequence[int]) -> str:
    """``0..3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in runs[:6]]
    return ", ".join(shown + ["..."] * (len(runs) > 6)) or "none"
