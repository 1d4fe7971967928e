"""Which variants take turns: what ``--against`` and ``--sweep`` mean."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.pretrained import find_bundle
from zsseg_rt.common import schema
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError, ConfigError

_NAMES = {"threads": "num_threads", "lanes": "num_lanes"}
_SETTINGS = tuple(one.name for one in dataclasses.fields(EngineConfig) if one.name != "num_lanes")
_WORK = ("classes", "frame", "streams")
_SWEPT = ("classes", "threads", "precision", "backend", "streams", "frame")
SWEEP_UNITS = {"classes": "class", "streams": "stream", "frame": "megapixel"}
"""Sweeps whose times are fitted by a line, and what its n counts."""
_LARGEST = {"classes": 65_534, "streams": 64}
_FRAME = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A bundle with settings.

    Attributes:
        name: What tables call it.
        bundle: The bundle's folder.
        config: Engine settings that differ from the defaults.
        classes: Number of made-up classes; None takes the classes of the profile.
        frame_hw: Size that frames are brought to; None leaves them.
        streams: Frames that are labelled at the same time.
        python: Another interpreter, whose own zsseg_rt runs; None takes this one.
        swept: The key of the sweep that made it.
        value: Its n: classes, streams or megapixels.
    """

    name: str
    bundle: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    frame_hw: tuple[int, int] | None = None
    streams: int = 1
    python: str | None = None
    swept: str | None = None
    value: float | None = None


def same_work(first: Variant, second: Variant) -> bool:
    """Whether two variants label the same frames with as many classes, as many at a time."""
    return (first.classes, first.frame_hw, first.streams) == (
        second.classes,
        second.frame_hw,
        second.streams,
    )


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
                f"--against: expected the same work as the first variant, got another {_WHAT[key]} "
                f"({key}={value}). Use --sweep {key}=... to see how times grow."
            )
    config = _with_settings(base.config, given, "--against")
    return replace(base, name=text, config=config)


def _names_a_bundle(text: str) -> bool:
    try:
        return (find_bundle(text) / "bundle.json").is_file()
    except BundleError:
        return False


_WHAT = {"classes": "class count", "frame": "frame size", "streams": "number of streams"}


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
        changed[name] = _value(name, text)
    try:
        EngineConfig.from_dict(changed)
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}") from exc
    return changed


def _value(name: str, text: str) -> Any:
    """A setting's value, of the type that its default has."""
    default = next(one.default for one in dataclasses.fields(EngineConfig) if one.name == name)
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if isinstance(default, int):
            return int(text)
        return float(text) if default is None and name != "cache_dir" else text
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
