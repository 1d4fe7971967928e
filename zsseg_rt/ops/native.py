"""Calls into the compiled core, whose own type errors print whole arrays."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from zsseg_rt.errors import DTypeError, ZssegError


def native(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the core."""
    try:
        return function(*arguments)
    except TypeError as exc:
        if isinstance(exc, ZssegError):
            raise
        names = re.findall(r"(\w+): ", (function.__doc__ or "").partition("\n")[0])
        given = (f"{name}: {_type_of(a)}" for name, a in zip(names, arguments, strict=False))
        raise DTypeError(
            f"{function.__name__}: expected arguments of the documented types, got "
            f"{', '.join(given)}"
        ) from None


def _type_of(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} {getattr(value, 'dtype', '')} {list(shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
