"""Read plain JSON data into frozen dataclasses, strictly: an unknown or missing key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

__all__ = ["decode", "encode", "nearest"]

T = TypeVar("T")


def decode(cls: type[T], raw: Any, where: str, error: type[Exception] = ValueError) -> T:
    """Build ``cls`` from JSON data, checking every key and type.

    Args:
        cls: A dataclass whose fields are annotated with str, Path, int, float, bool, None, Literal,
            tuple, Sequence, dict, unions of these and nested dataclass types; or such a type.
        raw: What ``json.load`` gave.
        where: What to call the data in messages, such as ``"bundle.json"``.
        error: The exception type to raise.

    Raises:
        error: A key is unknown or missing, or a value has the wrong type; the message names it.
    """
    return typing.cast(T, _decode(cls, raw, where, error))


def encode(value: Any) -> Any:
    """Turn nested dataclasses into plain JSON data; the inverse of :func:`decode`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def _decode(kind: Any, raw: Any, where: str, error: type[Exception]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(kind, raw, where, error)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, raw, where, error)
    if origin in (tuple, Sequence):
        return _decode_tuple(kind, raw, where, error)
    if origin in (dict, Mapping):
        if not isinstance(raw, dict):
            raise error(f"{where}: expected an object, got {_describe(raw)}")
        item_kind = typing.get_args(kind)[1]
        return {k: _decode(item_kind, v, f"{where}.{k}", error) for k, v in raw.items()}
    return _decode_scalar(kind, raw, where, error)


def _decode_dataclass(kind: Any, raw: Any, where: str, error: type[Exception]) -> Any:
    if not isinstance(raw, dict):
        raise error(f"{where}: expected an object, got {_describe(raw)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            raise error(f"{where}: unknown key {key!r}. {nearest(key, list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _decode(hints[name], raw[name], f"{where}.{name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: missing key {name!r}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as exc:
        raise error(f"{where}: {exc}") from exc


def nearest(name: str, known: list[str]) -> str:
    """What to tell a user of a name that is not known: the nearest one, and all."""
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known keys: {', '.join(known)}"


def _decode_tuple(kind: Any, raw: Any, where: str, error: type[Exception]) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise error(f"{where}: expected a list, got {_describe(raw)}")
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence or args[1:] == (Ellipsis,):
        return tuple(_decode(args[0], v, f"{where}[{i}]", error) for i, v in enumerate(raw))
    if len(args) != len(raw):
        raise error(f"{where}: expected {len(args)} items, got {len(raw)}")
    return tuple(
        _decode(a, v, f"{where}[{i}]", error)
        for i, (a, v) in enumerate(zip(args, raw, strict=True))
    )


def _decode_union(kind: Any, raw: Any, where: str, error: type[Exception]) -> Any:
    options = typing.get_args(kind)
    if raw is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return _decode(option, raw, where, error)
        except error:
            continue
    try:
        return _decode(rest[-1], raw, where, error)
    except error as failure:
        if len(rest) == 1 or isinstance(raw, (list, tuple, dict)):
            raise
        expected = " or ".join(dict.fromkeys(_expected(option) for option in rest))
        raise error(f"{where}: expected {expected}, got {_describe(raw)}") from failure


def _decode_scalar(kind: Any, raw: Any, where: str, error: type[Exception]) -> Any:
    if kind is Any:
        return raw
    if typing.get_origin(kind) is Literal:
        if raw not in typing.get_args(kind):
            raise error(f"{where}: expected {_expected(kind)}, got {_describe(raw)}")
        return raw
    if kind is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        if not math.isfinite(raw):
            raise error(f"{where}: expected a finite number, got {raw}")
        return float(raw)
    if kind in (str, int, bool) and type(raw) is kind:
        return raw
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    raise error(f"{where}: expected {_expected(kind)}, got {_describe(raw)}")


def _expected(kind: Any) -> str:
    """What values of a type are called in messages."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if origin in (tuple, Sequence):
        return "a list"
    if dataclasses.is_dataclass(kind) or origin in (dict, Mapping):
        return "an object"
    names = {str: "a string", Path: "a string", int: "an integer", float: "a number"}
    return names.get(kind, "true or false" if kind is bool else str(kind))


def _describe(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."
