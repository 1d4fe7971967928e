"""Pictures to quantise bundles with."""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from tools.scenes import SceneDataset
from zsseg_rt.evaluation.datasets.base import Sample
from zsseg_rt.export.quantized.bundle import QuantizeSettings

FAST = QuantizeSettings()


def write_photos(folder: Path, count: int = 8) -> Path:
    """Scenes of the drawn world as PNG files."""
    world = SceneDataset("val")
    for index in range(count):
        cv2.imwrite(str(folder / f"{index}.png"), world[index].image[..., ::-1])
    return folder


@dataclass
class FewScenes:
    """The first scenes with their masks; with ``blank``, nothing is annotated."""

    count: int
    blank: bool = False

    def __post_init__(self) -> None:
        self._world = SceneDataset("val")
        self.name, self.class_names = "few", self._world.class_names
        self.seen, self.ignore_label = self._world.seen, self._world.ignore_label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        sample = self._world[index]
        nothing = np.full_like(sample.labels, self.ignore_label)
        return replace(sample, labels=nothing) if self.blank else sample
