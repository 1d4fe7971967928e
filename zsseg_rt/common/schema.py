"""Read what users give strictly: JSON, plain data for dataclasses and functions, plain text."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from zsseg_rt.errors import ArgumentError, VocabularyError

T = TypeVar("T")
MAX_DEPTH = 64
_INT64 = range(-(2**63), 2**63)
_PLAIN = (str, int, float, bool, list, tuple, Mapping)
_UNUSUAL = re.compile(r"[^ -~]")
_KEPT = "\u200c\u200d\u00a0\u202f\u3000"  # parts of words and of emoji; spaces
_REFUSED = {"Cc": "a control character", "Cs": "half of a surrogate pair"}


def parse_json(data: bytes) -> Any:
    """Read JSON that every reader understands in the same way."""
    try:
        raw = json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as exc:
        raise ValueError(f"nesting deeper than {MAX_DEPTH} levels") from exc
    level = [raw]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return raw
    raise ValueError(f"nesting deeper than {MAX_DEPTH} levels")


def decode(cls: type[T], raw: Any, where: str, error: type[Exception] = ValueError) -> T:
    """Build ``cls`` from JSON data, checking every key and type."""
    return typing.cast(T, _decode(cls, raw, where, error))


def without_retired(
    raw: Mapping[str, Any], retired: Mapping[str, str], error: type[Exception] = ArgumentError
) -> dict[str, Any]:
    """Leave out keys of earlier versions that hold nothing; for what a ``from_earlier`` returns."""
    for name, instead in retired.items():
        if value := raw.get(name):
            raise error(f"{name}: expected nothing, it is retired, got {value!r}. {instead}")
    return {name: value for name, value in raw.items() if name not in retired}


def encode(value: Any) -> Any:
    """Turn nested dataclasses into plain JSON data; the inverse of :func:`decode`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_describe(key)} twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {value}")
    return value


def _children(item: Any) -> list[Any]:
    """The parts of a JSON value; half of a surrogate pair is a ValueError."""
    if isinstance(item, str):
        item.encode()
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return item if isinstance(item, list) else []


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
    try:
        raw = getattr(kind, "from_earlier", dict)(raw)
    except ArgumentError as exc:
        raise exc if isinstance(exc, error) else error(f"{where}: {exc}") from exc
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            hint = nearest(str(key), list(fields))
            raise error(f"{where}: unknown key {_describe(key)}. {hint}")
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


def nearest(name: str, keys: list[str]) -> str:
    """A hint for an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name, keys, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known keys: {', '.join(keys)}"


def _decode_tuple(kind: Any, raw: Any, where: str, error: type[Exception]) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise error(f"{where}: expected a list, got {_describe(raw)}")
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence or kinds[1:] == (Ellipsis,):
        kinds = kinds[:1] * len(raw)
    if len(kinds) != len(raw):
        raise error(f"{where}: expected {len(kinds)} items, got {len(raw)}")
    items = enumerate(zip(kinds, raw, strict=True))
    return tuple(_decode(one, item, f"{where}[{at}]", error) for at, (one, item) in items)


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
        if (isinstance(raw, int) and raw not in _INT64) or not math.isfinite(raw):
            raise error(f"{where}: expected a finite number, got {_describe(raw)}")
        return float(raw)
    if kind is int and type(raw) is int and raw not in _INT64:
        raise error(f"{where}: expected a 64-bit integer, got {_describe(raw)}")
    if kind in (str, int, bool) and type(raw) is kind:
        return raw
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    raise error(f"{where}: expected {_expected(kind)}, got {_describe(raw)}")


def _expected(kind: Any) -> str:
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
    try:
        text = repr(raw)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"an overlong {type(raw).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_settings(
    target: Callable[..., Any],
    settings: Mapping[str, Any],
    where: str,
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Keyword arguments for a function or class, as a user gave them."""
    names = setting_names(target)
    keys = None if names is None else [name for name in names if name not in hidden]
    for name in settings:
        if keys is not None and name not in keys:
            raise ArgumentError(f"{where}: unknown key {name!r}. {nearest(name, keys)}")
    parameters = inspect.signature(_taker(target)).parameters.values()
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    for name in required:
        if name not in settings and name not in hidden:
            raise ArgumentError(f"{where}.{name}: expected a value, got none. Add it.")
    return typed_settings(target, settings, where)


def typed_settings(
    target: Callable[..., Any], settings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The same, without checking which keys are known."""
    taker: Any = _taker(target)
    if isinstance(taker, type) and not dataclasses.is_dataclass(taker):
        taker = vars(taker)["__init__"]
    hints = typing.get_type_hints(taker)
    return {
        name: decode(hints[name], value, f"{where}.{name}", ArgumentError)
        if isinstance(value, _PLAIN) and name in hints
        else value
        for name, value in settings.items()
    }


def setting_names(target: Callable[..., Any]) -> list[str] | None:
    """Names of the keyword arguments of a function or class; None if it takes any."""
    parameters = inspect.signature(_taker(target)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _taker(target: Callable[..., Any]) -> Callable[..., Any]:
    """The function that receives the keyword arguments of a function or class."""
    return typing.cast("Callable[..., Any]", getattr(target, "settings_class", target))


def printable(text: str) -> str:
    """The text in one line, escaped where a terminal, log or reader of lines would trip over it."""
    return text if text.isprintable() else _UNUSUAL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() or character in _KEPT:
        return character
    # A document in JSON has no bare character of the first kind.
    return repr(character)[1:-1] if character < " " else json.dumps(character)[1:-1]


def json_text(content: Any, **form: Any) -> str:
    """The JSON of plain values, in their letters, with what :func:`printable` escapes escaped."""
    text = json.dumps(content, ensure_ascii=False, **form)
    return "\n".join(map(printable, text.split("\n")))


def check_plain_text(text: Any, where: str) -> str:
    """Return a text that can be written to any file and shown on any terminal."""
    if not isinstance(text, str):
        raise VocabularyError(f"{where}: expected a string, got {type(text).__name__} {text!r}")
    if text.isprintable():
        return text
    for place, character in enumerate(text):
        refused = _REFUSED.get(unicodedata.category(character))
        if refused:
            raise VocabularyError(
                f"{where}: expected plain text, got {refused} at position {place} of {text!r}. "
                "Remove it; if it came from a file, read that file as UTF-8."
            )
    return text
