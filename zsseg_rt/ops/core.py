"""What the package takes of the compiled core besides operations; only this room imports it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

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
)
from zsseg_rt.errors import CaptureError

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
