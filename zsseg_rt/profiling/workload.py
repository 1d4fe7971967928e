"""What all variants are given: the same frames, the same classes, as files that children read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, ConfigError, SourceError
from zsseg_rt.profiling.variants import Variant
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import read_golden
from zsseg_rt.stream.uris import open_sources, source_names

MOST_FRAMES = 16
_SEED = 0
ClassRequest = Sequence[Any]
Frames = list[npt.NDArray[np.uint8]]


class _Impatient:
    """Reads a source without waiting for its clock."""

    def wait(self, seconds: float) -> bool:
        return False

    def count_damaged(self) -> None:
        pass


def read_frames(sources: Sequence[str]) -> Frames:
    """The first frames of photos, folders, videos or cameras."""
    frames: Frames = []
    try:
        for source in open_sources(sources):
            pictures = source.pictures(_Impatient())
            for picture in pictures:
                frames.append(np.ascontiguousarray(picture.image))
                if len(frames) >= MOST_FRAMES:
                    break
            pictures.close()
    except (ArgumentError, SourceError) as exc:
        raise ConfigError(f"--source: {exc}") from exc
    if not frames:
        names = ", ".join(source_names(sources))
        raise ConfigError(f"--source: expected frames, got none from {names}")
    return frames[:MOST_FRAMES]


class Workload:
    """Frames and classes in files.

    Shapes:
        frames: uint8 RGB [H, W, 3] each.
    """

    def __init__(
        self,
        folder: Path,
        frames: Frames,
        classes: ClassRequest | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        self._folder, self._frames = folder, frames
        self._classes, self._templates = classes, templates
        self._files: dict[tuple[Any, ...], str] = {}

    def spec(self, variant: Variant) -> dict[str, Any]:
        """What a child opens; see :mod:`zsseg_rt.profiling.worker`."""
        names, embeddings = self._classes_of(variant)
        return {
            "bundle": str(variant.bundle.resolve()),
            "config": {key: _plain(value) for key, value in variant.config.items()},
            "classes": names,
            "embeddings": embeddings,
            "templates": None if self._templates is None else list(self._templates),
            "frames": self._frame_files(variant.frame_hw),
            "streams": variant.streams,
        }

    def num_classes(self, variant: Variant) -> int:
        """How many classes a variant is given."""
        return len(self._classes_of(variant)[0])

    def frame_sizes(self, variant: Variant) -> str:
        """Sizes of its frames, as ``WIDTHxHEIGHT``."""
        if variant.frame_hw is not None:
            sizes = [variant.frame_hw]
        else:
            sizes = [(frame.shape[0], frame.shape[1]) for frame in self._frames]
        return ", ".join(dict.fromkeys(f"{width}x{height}" for height, width in sizes))

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return len(self._frames)

    def check_class_counts(self, variants: Sequence[Variant]) -> None:
        """Refuse to compare bundles whose golden samples have different numbers of classes."""
        first = self.num_classes(variants[0])
        for variant in variants[1:]:
            count = self.num_classes(variant)
            if variant.classes is None and count != first:
                raise ConfigError(
                    f"--against: expected {first} classes as in {variants[0].bundle.name}, got "
                    f"{count} in {variant.bundle.name}'s sample. Name them with --classes, or use "
                    "--sweep classes=..."
                )

    def _classes_of(self, variant: Variant) -> tuple[list[Any], str | None]:
        if variant.classes is not None:
            width = Bundle.load(variant.bundle).text.embed_dim
            names = [f"class {index}" for index in range(variant.classes)]
            return names, self._embeddings(variant.classes, width)
        if self._classes is not None:
            return list(self._classes), None
        return self._golden_classes(variant)

    def _golden_classes(self, variant: Variant) -> tuple[list[Any], str]:
        bundle = Bundle.load(variant.bundle)
        family = create_family(bundle, EngineConfig())
        golden = read_golden(bundle, family)
        sets = [golden.get(text.golden, golden["text_embeds"]) for text in family.prompt_sets]
        embeds = np.stack(sets) if len(sets) > 1 else sets[0]
        names = [str(name) for name in golden["class_names"]]
        return names, self._save(("golden", str(variant.bundle)), embeds.astype(np.float32))

    def _embeddings(self, count: int, width: int) -> str:
        rows = np.random.default_rng(_SEED).standard_normal((count, width))
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return self._save(("random", count, width), unit.astype(np.float32))

    def _frame_files(self, frame_hw: tuple[int, int] | None) -> list[str]:
        return [
            self._save(("frame", index, frame_hw), _resized(frame, frame_hw))
            for index, frame in enumerate(self._frames)
        ]

    def _save(self, key: tuple[Any, ...], array: npt.NDArray[Any]) -> str:
        if key not in self._files:
            path = self._folder / f"{len(self._files)}.npy"
            np.save(path, array)
            self._files[key] = str(path)
        return self._files[key]


def _resized(
    frame: npt.NDArray[np.uint8], frame_hw: tuple[int, int] | None
) -> npt.NDArray[np.uint8]:
    if frame_hw is None:
        return frame
    import cv2

    resized: npt.NDArray[np.uint8] = cv2.resize(frame, frame_hw[::-1])
    return np.ascontiguousarray(resized)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
