"""Which variants take turns (``--against``, ``--sweep``), and the work that they are given."""

from __future__ import annotations

import json
import os
import re
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
Frames = list[npt.NDArray[np.uint8]]
_SETTINGS = {one.name: one.metadata["option"] for one in fields(EngineConfig)}
del _SETTINGS["num_lanes"]
_NAMES = {o.name(name)[2:]: name for name, o in _SETTINGS.items() if o is not None and o.names}
_WORK = {"classes": "class count", "frame": "frame size", "streams": "number of streams"}
_SWEPT = ("classes", "threads", "precision", "backend", "streams", "frame")
SWEEP_UNITS = {"classes": "class", "streams": "stream", "frame": "megapixel"}
"""Sweeps whose times are fitted by a line, and what its n counts."""
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
    swept: str | None = None  # the key of the sweep that made it
    value: float | None = None  # its n: classes, streams or megapixels

    @property
    def work(self) -> tuple[Any, ...]:
        """What must be equal for times to be compared."""
        return self.classes, self.frame_hw, self.streams


def read_against(text: str, base: Variant) -> Variant:
    """A bundle's folder, or settings as ``KEY=VALUE,KEY=VALUE``."""
    if "=" not in text or os.path.isdir(text):  # noqa: PTH112 - before it is a path at all
        if not _names_a_bundle(text):
            raise ConfigError(
                f"--against: expected a bundle or KEY=VALUE, got {text!r}. "
                f"Known keys: {', '.join(_known())}"
            )
        return replace(base, name=_bundle_name(text, base), bundle=find_bundle(text))
    given = dict(_pair(part, "--against") for part in text.split(","))
    for key, value in given.items():
        if key in _WORK:
            raise ConfigError(
                f"--against: expected the same work as the first variant, got another {_WORK[key]} "
                f"({key}={value}). Use --sweep {key}=... to see how times grow."
            )
    config = _with_settings(base.config, given, "--against")
    return replace(base, name=text, config=config)


def _names_a_bundle(text: str) -> bool:
    try:
        return (find_bundle(text) / "bundle.json").is_file()
    except BundleError:
        return False


def read_sweep(text: str, base: Variant) -> list[Variant]:
    """Variants from ``KEY=VALUE,VALUE``."""
    key, values = _pair(text, "--sweep")
    if key not in _SWEPT:
        raise ConfigError(f"--sweep: unknown key {key!r}. {schema.nearest(key, list(_SWEPT))}")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--sweep: expected distinct values after {key}=, got {values!r}")
    return [_swept(base, key, value) for value in found]


def _swept(base: Variant, key: str, value: str) -> Variant:
    named = replace(base, name=f"{key}={value}", swept=key)
    if key == "frame":
        match = _FRAME.fullmatch(value)
        if match is None:
            raise ConfigError(f"--sweep: expected frame=WIDTHxHEIGHT, got {value!r}")
        width, height = int(match[1]), int(match[2])
        return replace(named, frame_hw=(height, width), value=width * height / 1e6)
    if key in _LARGEST:
        count = _count(key, value)
        changed = {"classes": count} if key == "classes" else {"streams": count}
        return replace(named, value=float(count), **changed)  # type: ignore[arg-type]
    return replace(named, config=_with_settings(base.config, {key: value}, "--sweep"))


def _count(key: str, value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= _LARGEST[key]:
        raise ConfigError(f"--sweep: expected {key} from 1 to {_LARGEST[key]}, got {value!r}")
    return int(value)


def _with_settings(
    config: Mapping[str, Any], given: Mapping[str, str], option: str
) -> dict[str, Any]:
    changed = dict(config)
    for key, text in given.items():
        name = _NAMES.get(key, key)
        if name not in _SETTINGS:
            raise ConfigError(f"{option}: unknown key {key!r}. {schema.nearest(key, _known())}")
        changed[name] = _value(text)
    try:
        EngineConfig.from_dict(changed)
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}") from exc
    return changed


def _value(text: str) -> Any:
    """A number, true or false; or a word."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"{option}: expected KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _known() -> list[str]:
    shown = {name: short for short, name in _NAMES.items()}
    return sorted(shown.get(name, name) for name in _SETTINGS)


def _bundle_name(text: str, base: Variant) -> str:
    name = Path(text).name
    return name if name != base.name else f"{Path(text).parent.name}/{name}"


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
        classes: Sequence[Any] | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        self._folder, self._frames = folder, frames
        self._classes, self._templates = classes, templates
        self._files: dict[tuple[Any, ...], str] = {}

    def spec(self, variant: Variant) -> dict[str, Any]:
        """What a child opens."""
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
