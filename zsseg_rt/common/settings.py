"""A setting in one place: its default, what it means, and how the command line takes it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.errors import ConfigError

T = TypeVar("T")
Check = Callable[[str, Any], None]
"""Refuses a bad value of the setting of that name."""
_WIDTH = 96


@dataclass(frozen=True)
class Option:
    """How the command line takes a setting."""

    help: str  # Its line in --help
    names: tuple[str, ...] = ()  # With dashes, such as ("--out", "-o"); none: the field's own
    read: Callable[[Any], Any] | None = None  # Turns what was typed into the value; None: as it is
    kind: Any = None  # Type of what is typed; None: the field's
    # What else the parser is told: min, max, envvar, metavar
    extra: Mapping[str, Any] | None = None

    def name(self, field_name: str) -> str:
        """The option as a user writes it."""
        return self.names[0] if self.names else "--" + field_name.replace("_", "-")


def setting(
    default: Any,
    doc: str,
    option: str | Option | None = None,
    *,
    check: Check | None = None,
    of: str = "all",
    **how: Any,
) -> Any:
    """Declare a field of a dataclass."""
    option = Option(option) if isinstance(option, str) else option
    how["default_factory" if callable(default) else "default"] = default
    return field(metadata={"doc": doc, "option": option, "check": check, "of": of}, **how)


def documented(cls: type[T]) -> type[T]:
    """Write what the fields of a dataclass mean into its docstring, as section *Attributes*."""
    parts = [f"{one.name}: {one.metadata['doc']}" for one in fields(cls)]  # type: ignore[arg-type]
    wrap = textwrap.TextWrapper(_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)
    section = "Attributes:\n" + "\n".join("\n".join(wrap.wrap(part)) for part in parts)
    head, raises, end = (cls.__doc__ or "").partition("Raises:")
    cls.__doc__ = f"{head.rstrip()}\n\n    {section}\n\n    {raises}{end}".rstrip() + "\n"
    return cls


def check_settings(settings: Any) -> None:
    """Check every setting by its own rule; None passes where it is the default."""
    for one in fields(settings):
        check, value = one.metadata["check"], getattr(settings, one.name)
        if check is not None and not (value is None and one.default is None):
            check(one.name, value)


def one_of(*choices: str, end: str = "") -> Check:
    """The value is one of these words; ``end`` is what else the message allows."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}{end}, got {value!r}")

    return check


def within(low: int, high: int, meaning: str) -> Check:
    """The value is a whole number between these."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ConfigError(f"{name}: expected from {low} to {high} ({meaning}), got {value}")

    return check


def in_unit(what: str) -> Check:
    """The value is a share of one, or None."""

    def check(name: str, value: Any) -> None:
        if not is_share(value):
            raise ConfigError(f"{name}: expected {what} in [0, 1] or None, got {value}")

    return check


def is_share(value: float | None) -> bool:
    """Whether a value is None or in [0, 1]."""
    return value is None or (isinstance(value, (int, float, np.number)) and 0.0 <= value <= 1.0)


def changed(settings: Any, names: Collection[str] | None = None) -> dict[str, Any]:
    """The settings that differ from their defaults, by name; None looks at all of them."""
    usual = type(settings)()
    return {
        one.name: getattr(settings, one.name)
        for one in fields(settings)
        if (names is None or one.name in names)
        and getattr(settings, one.name) != getattr(usual, one.name)
    }
