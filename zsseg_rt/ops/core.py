"""What the package takes of the compiled core besides operations; only this room imports it."""

from __future__ import annotations

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
]
