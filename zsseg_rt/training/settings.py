"""Settings of a configuration, checked against the signature of what they are given to."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from zsseg_rt import schema
from zsseg_rt.errors import ArgumentError

__all__ = ["checked_settings", "setting_names", "typed_settings"]

_PLAIN = (str, int, float, bool, list, tuple, Mapping)


def checked_settings(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    where: str,
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Keyword arguments for a function or class, as a person gave them.

    Args:
        target: What takes them.
        given: Plain values as in TOML; tables and lists become the records and tuples that are
            asked for. Values of other kinds, which only Python code can give, pass unchecked.
        where: What to call the settings in messages, such as ``"model.options"``.
        hidden: Arguments that are not for people to give.

    Raises:
        ArgumentError: A key is unknown or missing, or its value is of the wrong type.
    """
    names = setting_names(target)
    known = None if names is None else [name for name in names if name not in hidden]
    for name in given:
        if known is not None and name not in known:
            raise ArgumentError(f"{where}: unknown key {name!r}. {schema.nearest(name, known)}")
    missing = [name for name in _required(target) if name not in given and name not in hidden]
    if missing:
        raise ArgumentError(f"{where}.{missing[0]}: expected a value, got none. Add it.")
    return typed_settings(target, given, where)


def typed_settings(
    target: Callable[..., Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The same without a look at which keys are known.

    Raises:
        ArgumentError: A value is of the wrong type.
    """
    hints = _hints(target)
    return {
        name: schema.decode(hints[name], value, f"{where}.{name}", ArgumentError)
        if isinstance(value, _PLAIN) and name in hints
        else value
        for name, value in given.items()
    }


def setting_names(target: Callable[..., Any]) -> list[str] | None:
    """Names of the keyword arguments of a function or class; None if it takes any.

    A class's ``**options`` are those of the class it derives from.
    """
    names: list[str] = []
    for function in _functions(target):
        parameters = inspect.signature(function).parameters.values()
        names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _required(target: Callable[..., Any]) -> list[str]:
    (function, *_) = _functions(target)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for function in _functions(target):
        hints = typing.get_type_hints(function) | hints
    return hints


def _functions(target: Callable[..., Any]) -> Iterator[Any]:
    """The function itself, or the constructors of a class and of what it derives from."""
    if not isinstance(target, type):
        yield target
        return
    for base in target.__mro__:
        if base is not object and "__init__" in vars(base):
            yield vars(base)["__init__"]
