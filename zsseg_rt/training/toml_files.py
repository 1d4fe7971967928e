"""Read TOML files: a user's own, or one that comes with the package."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsseg_rt.errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_MAX_DEPTH = 20


def read_toml(source: str | Path, kept_in: Traversable) -> tuple[dict[str, Any], str]:
    """Read a TOML file, or one that comes with the package, laid over the kept one it names.

    Returns:
        Its tables, over those of its ``base`` if it has one, and what to call it in messages.
    """
    text, where = _read_source(source, kept_in)
    try:
        tables = _parse(text, where)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{where}: expected valid TOML, got an error: {error}") from error
    _check_plain(tables, where)
    if "base" not in tables:
        return tables, where
    base = tables.pop("base")
    if not isinstance(base, str) or base not in _kept_names(kept_in):
        raise ArgumentError(
            f"{where}: base: expected one of the {kept_in.name} {', '.join(list_kept(kept_in))}, "
            f"got {_short(repr(base))}. Check the spelling, or leave it out."
        )
    return merge(read_toml(str(kept_in / f"{base}.toml"), kept_in)[0], tables), where


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over tables; values and lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def list_kept(kept_in: Traversable) -> list[str]:
    """Names of the TOML files in a folder of the package, but for those that others build on."""
    return sorted(name for name in _kept_names(kept_in) if not name.startswith("_"))


def _kept_names(kept_in: Traversable) -> list[str]:
    names = (entry.name for entry in kept_in.iterdir())
    return [name.removesuffix(".toml") for name in names if name.endswith(".toml")]


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise _too_large(where) from error


def _check_plain(tables: dict[str, Any], where: str) -> None:
    """Refuse valid TOML that is never a setting: dates, deep nesting, text that is not Unicode."""
    level: list[Any] = [tables]
    for _ in range(_MAX_DEPTH):
        for value in level:
            _check_value(value, where)
        groups = [value for value in level if isinstance(value, (list, dict))]
        level = [item for group in groups for item in group]
        level += [item for group in groups if isinstance(group, dict) for item in group.values()]
    if level:
        raise _too_deep(where)


def _check_value(value: Any, where: str) -> None:
    if not isinstance(value, (str, int, float, list, dict)):
        raise ArgumentError(
            f"{where}: expected text, numbers, true or false, lists and tables, got the "
            f"{type(value).__name__} {value}. Put it in quotes."
        )
    if isinstance(value, float) and math.isnan(value):  # differs from itself when a run goes on
        raise ArgumentError(f"{where}: expected numbers, got nan. Write a number.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _too_large(where)
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ArgumentError(
            f"{where}: expected UTF-8 text, got {_short(ascii(value))}. Rename the file it names."
        )


def _too_large(where: str) -> ArgumentError:
    return ArgumentError(f"{where}: expected 64-bit integers, got a larger one. Fix the number.")


def _too_deep(where: str) -> ArgumentError:
    return ArgumentError(
        f"{where}: expected at most {_MAX_DEPTH} lists and tables inside each other, got more. "
        "Check the brackets, and the dots in keys."
    )


def _short(text: object) -> str:
    return str(text) if len(str(text)) <= 100 else f"{str(text)[:97]}..."


def _read_source(source: str | Path, kept_in: Traversable) -> tuple[str, str]:
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{_short(path)}: cannot be read: {_short(error)}") from error
    kept = kept_in / f"{source}.toml"
    if path.suffix == "" and path.name == str(source) and kept.is_file():
        return kept.read_text(encoding="utf-8"), f"{kept_in.name.removesuffix('s')} {source}"
    raise ArgumentError(
        f"config: expected a TOML file or one of the {kept_in.name} "
        f"{', '.join(list_kept(kept_in))}, got {str(source)!r}. Check the path."
    )


def apply_change(raw: dict[str, Any], change: str) -> None:
    """Set ``table.key=value`` in plain data."""
    path, equals, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ArgumentError(f"--set: expected table.key=value, got {_short(repr(change))}")
    if len(keys) > _MAX_DEPTH:
        raise _too_deep("--set")
    try:
        value = _parse(f"value = {text}", f"--set {_short(path)}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _check_plain({path: value}, "--set")
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ArgumentError(f"--set: expected a table at {key!r} of {path!r}, got a value")
    table[keys[-1]] = value
