"""The world as a segmentation data set."""

from __future__ import annotations

from typing import Any, Literal

from tools.scenes.words import CLASS_NAMES, SEEN
from tools.scenes.world import IGNORE, World
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import Sample

_SPLITS = {"train": 1, "val": 2, "pretraining": 3, "demo": 4, "train_seen": 5}
_SEEDS_APART = 8  # room for splits between one data set's seed and the next
_LENGTHS = {"train": 20_000, "val": 500, "pretraining": 1_000_000, "demo": 16, "train_seen": 20_000}

_SEEN_NAMES = tuple(CLASS_NAMES[index] for index in SEEN)


def world_of_split(split: str, seed: int = 0, **settings: Any) -> World:
    """The world whose scenes belong to one split and seed, and to no other."""
    check_choice("split", split, _SPLITS)
    if seed < 0:
        raise ArgumentError(f"seed: expected >= 0, got {seed}. Choose another.")
    return World(_SEEDS_APART * seed + _SPLITS[split], **settings)


class SceneDataset:
    """Labelled scenes, as a ``SegmentationDataset``."""

    def __init__(
        self,
        split: Literal["train", "val", "pretraining", "demo", "train_seen"] = "train",
        *,
        size: int | tuple[int, int] = 128,
        length: int | None = None,
        seed: int = 0,
        class_share: float = 0.85,
        zoom: int = 1,
    ) -> None:
        self.class_names = CLASS_NAMES
        self.world = world_of_split(
            split,
            seed,
            size=size,
            class_share=class_share,
            zoom=zoom,
            common=_SEEN_NAMES if split == "train_seen" else CLASS_NAMES,
        )
        if length is not None and length < 1:
            raise ArgumentError(f"length: expected at least 1, got {length}. Choose more.")
        self.name = f"scenes/{split}"
        self.seen = SEEN
        self.ignore_label = IGNORE
        self._length = _LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Draw a scene; see :class:`SegmentationDataset`."""
        if not 0 <= index < self._length:
            raise IndexError(f"index: expected 0 to {self._length - 1}, got {index}")
        scene = self.world.scene(index, num_captions=0)
        return Sample(image=scene.image, labels=scene.labels, name=f"{self.name}/{index:06d}")
