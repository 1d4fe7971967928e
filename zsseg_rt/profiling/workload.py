"""Which variants take turns (``--against``, ``--sweep``), and the work that they are given."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.pretrained import find_bundle
from zsseg_rt.common import schema
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BundleError, ConfigError, SourceError
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import read_golden
from zsseg_rt.stream.uris import open_sources, source_names

MOST_FRAMES = 16
_SEED = 0
_PATIENCE = 30.0  # seconds for the frames of a source
Frames = list[npt.NDArray[np.uint8]]
_SETTINGS = {one.name: one.metadata["option"] for one in fields(EngineConfig)}
del _SETTINGS["num_lanes"]
_KEYS = {(o.name(name)[2:] if o else name): name for name, o in _SETTINGS.items()}
_WORK = {"classes": "class count", "frame": "frame size", "streams": "number of streams"}
_SWEPT = ("classes", "threads", "precision", "backend", "streams", "frame")
_LARGEST = {"classes": 65_534, "streams": 64}
_FRAME = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A bundle with settings."""

    name: str  # in tables
    bundle: Path
    config: Mapping[str, Any] = field(default_factory=dict)  # what differs from the defaults
    classes: int | None = None  # made-up ones; None takes the classes of the profile
    frame_hw: tuple[int, int] | None = None  # size that frames are brought to; None leaves them
    streams: int = 1  # frames labelled at the same time
    python: str | None = None  # another interpreter, whose own zsseg_rt runs
    swept: bool = False  # whether a sweep made it

    @property
    def work(self) -> tuple[Any, ...]:
        """All that must be equal for times to be compared."""
        return self.classes, self.frame_hw, self.streams


def read_against(text: str, base: Variant) -> Variant:
    """A bundle's folder, or settings as ``KEY=VALUE,KEY=VALUE``."""
    if "=" not in text or os.path.isdir(text):  # noqa: PTH112 - before it is a path at all
        try:
            bundle = find_bundle(text)
        except BundleError:
            bundle = Path(text)
        if not (bundle / "bundle.json").is_file():
            raise ConfigError(
                f"--against: expected a bundle or KEY=VALUE, got {text!r}. "
                f"Known keys: {', '.join(sorted(_KEYS))}"
            )
        name = Path(text).name
        name = name if name != base.name else f"{Path(text).parent.name}/{name}"
        return replace(base, name=name, bundle=bundle)
    settings = dict(_pair(part, "--against") for part in text.split(","))
    for key, value in settings.items():
        if key in _WORK:
            raise ConfigError(
                f"--against: expected the same work as the first variant, got another {_WORK[key]} "
                f"({key}={value}). Use --sweep {key}=... to see how times grow."
            )
    return replace(base, name=text, config=_with_settings(base.config, settings, "--against"))


def read_sweep(text: str, base: Variant) -> list[Variant]:
    """Variants from ``KEY=VALUE,VALUE``."""
    key, values = _pair(text, "--sweep")
    if key not in _SWEPT:
        raise ConfigError(f"--sweep: unknown key {key!r}. {schema.nearest(key, list(_SWEPT))}")
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if not listed or len(set(listed)) < len(listed):
        raise ConfigError(f"--sweep: expected distinct values after {key}=, got {values!r}")
    return [_swept(base, key, value) for value in listed]


def _swept(base: Variant, key: str, value: str) -> Variant:
    named = replace(base, name=f"{key}={value}", swept=True)
    if key in _LARGEST:
        if not value.isdecimal() or not 1 <= int(value) <= _LARGEST[key]:
            raise ConfigError(f"--sweep: expected {key} from 1 to {_LARGEST[key]}, got {value!r}")
        number: dict[str, Any] = {key: int(value)}
        return replace(named, **number)
    if key != "frame":
        return replace(named, config=_with_settings(base.config, {key: value}, "--sweep"))
    match = _FRAME.fullmatch(value)
    if match is None:
        raise ConfigError(f"--sweep: expected frame=WIDTHxHEIGHT, got {value!r}")
    return replace(named, frame_hw=(int(match[2]), int(match[1])))


def _with_settings(
    config: Mapping[str, Any], settings: Mapping[str, str], option: str
) -> dict[str, Any]:
    changed = dict(config)
    for key, text in settings.items():
        name = _KEYS.get(key, key)
        if name not in _SETTINGS:
            raise ConfigError(
                f"{option}: unknown key {key!r}. {schema.nearest(key, sorted(_KEYS))}"
            )
        try:
            changed[name] = json.loads(text.lower())  # a number, true or false
        except ValueError:
            changed[name] = text
    try:
        EngineConfig.from_dict(changed)
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}") from exc
    return changed


def _pair(text: str, option: str) -> tuple[str, str]:
    key, _, value = (part.strip() for part in text.partition("="))
    if not key or not value:
        raise ConfigError(f"{option}: expected KEY=VALUE, got {text!r}")
    return key, value


class _Impatient:
    """Reads a source without waiting for its clock; one that stays silent is given up."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + _PATIENCE

    def wait(self, seconds: float) -> bool:
        return time.monotonic() > self._ends_at

    def count_damaged(self) -> None:
        pass


def read_frames(sources: Sequence[str]) -> Frames:
    """The first frames of photos, folders, videos or cameras."""
    frames: Frames = []
    try:
        for source in open_sources(sources):
            with contextlib.closing(source.pictures(_Impatient())) as images:
                first = itertools.islice(images, MOST_FRAMES - len(frames))
                frames += [np.ascontiguousarray(one.image) for one in first]
    except (ArgumentError, SourceError) as exc:
        raise ConfigError(f"--source: {exc}") from exc
    if not frames:
        names = ", ".join(source_names(sources))
        raise ConfigError(f"--source: expected frames, got none from {names}")
    return frames


class Workload:
    """Frames (uint8 RGB [H, W, 3]) and classes, in files of a folder for children to open."""

    def __init__(
        self,
        folder: Path,
        frames: Frames,
        classes: Sequence[Any] | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        self._folder, self._frames = folder, frames
        self._classes, self._templates = classes, templates
        self._files: dict[tuple[Any, ...], str] = {}
        self.num_frames = len(frames)

    def spec(self, variant: Variant) -> dict[str, Any]:
        """The specification that a child opens."""
        names, embeddings = self._classes_of(variant)
        frames = []
        for index, frame in enumerate(self._frames):
            height, width = variant.frame_hw or frame.shape[:2]
            if frame.shape[:2] != (height, width):
                import cv2

                frame = np.asarray(cv2.resize(frame, (width, height)), np.uint8)
            frames.append(self._save(("frame", index, height, width), frame))
        config = variant.config.items()
        return {
            "bundle": str(variant.bundle.resolve()),
            "config": {key: str(v) if isinstance(v, Path) else v for key, v in config},
            "classes": names,
            "embeddings": embeddings,
            "templates": None if self._templates is None else list(self._templates),
            "frames": frames,
            "streams": variant.streams,
        }

    def num_classes(self, variant: Variant) -> int:
        """How many classes a variant is given."""
        return len(self._classes_of(variant)[0])

    def frame_sizes(self, variant: Variant) -> str:
        """Sizes of its frames, as ``WIDTHxHEIGHT``."""
        sizes = (variant.frame_hw or frame.shape[:2] for frame in self._frames)
        return ", ".join(dict.fromkeys(f"{width}x{height}" for height, width in sizes))

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
        """Names, and the file of their embeddings unless the engine makes them."""
        if variant.classes is None and self._classes is not None:
            return list(self._classes), None
        bundle = Bundle.load(variant.bundle)
        if variant.classes is not None:
            shape = (variant.classes, bundle.text.embed_dim)
            rows = np.random.default_rng(_SEED).standard_normal(shape)
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            names = [f"class {index}" for index in range(variant.classes)]
            return names, self._save(("random", *shape), unit)
        family = create_family(bundle, EngineConfig())
        golden = read_golden(bundle, family)
        sets = [golden.get(text.golden, golden["text_embeds"]) for text in family.prompt_sets]
        embeds = np.stack(sets) if len(sets) > 1 else sets[0]
        names = [str(name) for name in golden["class_names"]]
        return names, self._save(("golden", str(variant.bundle)), embeds)

    def _save(self, key: tuple[Any, ...], array: npt.NDArray[Any]) -> str:
        """The file of an array, which is written once; embeddings are float32."""
        if key not in self._files:
            path = self._folder / f"{len(self._files)}.npy"
            np.save(path, array if array.dtype == np.uint8 else array.astype(np.float32))
            self._files[key] = str(path)
        return self._files[key]
