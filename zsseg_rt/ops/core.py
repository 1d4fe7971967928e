"""The parts of the compiled core besides operations; only this room imports it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from zsseg_rt._C import (
    DEPTH_WORKSPACE_BYTES,
    Capture,
    DeviceArray,
    Event,
    PinnedArray,
    Stream,
    built_with_cuda,
    cpu_isa,
    cuda_device_count,
    cuda_device_properties,
    cuda_runtime_version,
    cuda_set_device,
    label_regions_device_bytes,
    move_labels,
)
from zsseg_rt.errors import CaptureError, DTypeError, ZssegError

_Value = TypeVar("_Value")
_CAPTURES_END = 2.0  # seconds

__all__ = [
    "DEPTH_WORKSPACE_BYTES",
    "Capture",
    "DeviceArray",
    "Event",
    "PinnedArray",
    "Stream",
    "built_with_cuda",
    "cpu_isa",
    "cuda_device_count",
    "cuda_device_properties",
    "cuda_runtime_version",
    "cuda_set_device",
    "label_regions_device_bytes",
    "move_labels",
    "outside_captures",
]


def outside_captures(work: Callable[[], _Value]) -> _Value:
    """Return what work gives, which is done again while a capture in another thread forbids it."""
    last = time.monotonic() + _CAPTURES_END
    while True:
        try:
            return work()
        except CaptureError:
            if time.monotonic() >= last:
                raise
            time.sleep(0.001)


def native(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the core."""
    try:
        return function(*arguments)
    except TypeError as exc:
        if isinstance(exc, ZssegError):
            raise
        names = re.findall(r"(\w+): ", (function.__doc__ or "").partition("\n")[0])
        types = (f"{name}: {_type_of(a)}" for name, a in zip(names, arguments, strict=False))
        raise DTypeError(
            f"{function.__name__}: expected arguments of the documented types, got "
            f"{', '.join(types)}"
        ) from None


def _type_of(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} {getattr(value, 'dtype', '')} {list(shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
