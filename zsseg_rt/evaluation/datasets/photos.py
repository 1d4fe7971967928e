"""Photos without annotations, for objectives that need none: ImageNet, or your own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zsseg_rt.common.files import is_folder
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import Sample, ignore_label
from zsseg_rt.evaluation.datasets.layout import pictures_below
from zsseg_rt.evaluation.datasets.reading import read_picture
from zsseg_rt.photos import SUFFIXES


class PhotoDataset:
    """All images below a folder; there are no classes and no pixel is annotated."""

    def __init__(self, root: str | Path, split: str = "all") -> None:
        place = Path(root).expanduser()
        folder = place if split == "all" else place / split
        if not is_folder(folder):
            raise DatasetError(
                f"{folder}: expected a folder of photos, got none. Check data.root, or set "
                "data.split to 'all' to take everything below it."
            )
        self._paths = pictures_below(folder)
        if not self._paths:
            raise DatasetError(
                f"{folder}: expected photos ({', '.join(SUFFIXES)}) in it or in folders "
                "below it, got none. Check the folder."
            )
        self._folder = folder
        self.name = f"{place.resolve().name}/{split}"
        self.class_names: tuple[str, ...] = ()
        self.seen: tuple[int, ...] = ()
        self.ignore_label = ignore_label(0)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """Read one image; all its labels are ``ignore_label``."""
        relative = self._paths[index]
        image = read_picture(self._folder / relative)
        labels = np.full(image.shape[:2], self.ignore_label, np.uint8)
        return Sample(image=image, labels=labels, name=relative)
