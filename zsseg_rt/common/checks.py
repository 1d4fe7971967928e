"""Checks that many parts share, each in one wording, and names in the terms of the user."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from zsseg_rt.errors import ArgumentError, ConfigError, ShapeError, ZssegError


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ArgumentError(f"{name}: expected one of {known}, got {value!r}. Check the spelling.")


def check_range(settings: object, *names: str, least: float = 0, most: float = math.inf) -> None:
    """Refuse fields, or any number of their tuples, that are outside a range; None is in any."""
    limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        inside = (least <= number <= most and math.isfinite(number) for number in numbers)
        if value is not None and not (numbers and all(inside)):
            raise ArgumentError(f"{name}: expected {limits}, got {value}. Choose another value.")


def check_size(size_hw: tuple[int, int], patch_size: int) -> None:
    """Refuse sizes that patches do not fill exactly."""
    if min(size_hw) < 1 or any(side % patch_size for side in size_hw):
        raise ShapeError(
            f"image_size: expected multiples of {patch_size}, as patches or strides are, got "
            f"{size_hw[0]}x{size_hw[1]}. Use the next multiple."
        )


@contextmanager
def arguments_called(
    names: Mapping[str, str], table: str = "", fields: Collection[str] = ()
) -> Iterator[None]:
    """Raise errors under the option or key that the user gave; ``fields`` are keys of ``table``."""
    try:
        yield
    except ZssegError as error:
        argument = error.argument or ""
        name = names.get(argument, f"{table}.{argument}" if argument in fields else "")
        if not name:
            raise
        raise error.renamed(name) from error


def canonical_device(device: Any) -> Any:
    """A device as it is written everywhere else: ``cuda`` is the first GPU, in any case."""
    is_torch = type(device).__module__ == "torch"
    spelled = str(device).lower() if isinstance(device, str) or is_torch else device
    return "cuda:0" if spelled == "cuda" else spelled


def check_device_name(argument: str, device: Any) -> None:
    """Refuse anything but ``auto``, ``cpu`` and ``cuda:N``."""
    if device in ("auto", "cpu") or re.fullmatch(r"cuda:\d{1,3}", str(device)):
        return
    number = re.fullmatch(r"\D*(\d{1,3})", str(device))
    raise ConfigError(
        f"{argument}: expected 'auto', 'cpu' or 'cuda:N', got {device!r}. Write "
        f"'cuda:{number[1] if number else 0}' for an NVIDIA GPU, 'cpu' without one."
    )
