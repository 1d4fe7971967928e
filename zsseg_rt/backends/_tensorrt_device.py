"""The GPU behind a TensorRT session, asked through this package's own CUDA runtime.

One of TensorRT's runtimes crashes on a computer without a driver, so the device is always checked
here before any TensorRT object is constructed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zsseg_rt.common.arrays import typestr_of
from zsseg_rt.errors import DeviceError, DTypeError, ShapeError

ADDRESS_ALIGNMENT = 256  # bytes, of every address given to TensorRT


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU."""

    index: int  # N of "cuda:N"
    name: str  # The driver's name for it
    compute_capability: str  # Such as "8.9"
    multiprocessors: int  # How many it has; GPUs of one name may differ in it
    total_memory: int  # Bytes
    driver: int  # Newest CUDA that the driver serves, such as 13000
    runtime: str  # CUDA runtime of this package's build, such as "13.0"


@dataclass(frozen=True, kw_only=True)
class DeviceFeed:
    """Where an input is: address, dtype name, shape, and the stream that writes it, if any."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    stream: int | None


def native() -> Any:
    """Return the compiled module of this package."""
    from zsseg_rt.ops import core

    return core


def open_gpu(device: str) -> Gpu:
    """Check that a device name refers to a visible GPU."""
    match = re.fullmatch(r"cuda:(\d+)", device)
    if match is None:
        raise DeviceError(f"device: expected 'cuda:N' for backend 'tensorrt', got {device!r}")
    index, count = int(match[1]), native().cuda_device_count()
    if count == 0:
        raise DeviceError(
            f"device: no NVIDIA GPU visible: expected one for {device!r}, but there is no GPU, no "
            "NVIDIA driver, a driver too old for this build's CUDA, or a build without CUDA. Run "
            "nvidia-smi and zsseg-rt doctor, check CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
    if index >= count:
        raise DeviceError(
            f"device: expected cuda:0 to cuda:{count - 1}, got {device!r}. Check "
            "CUDA_VISIBLE_DEVICES."
        )
    properties = native().cuda_device_properties(index)
    return Gpu(
        index=index,
        name=properties["name"],
        compute_capability=properties["compute_capability"],
        multiprocessors=properties["multiprocessors"],
        total_memory=properties["total_memory"],
        driver=properties["driver"],
        runtime=native().cuda_runtime_version(),
    )


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make a GPU the calling thread's current one, which TensorRT uses.

    It stays so where the caller's was never used: to restore that one would make a context there.
    """
    previous = native().cuda_set_device(index)
    try:
        yield
    finally:
        native().cuda_set_device(previous, only_active=True)


def order_after(feed_stream: int | None, stream: int, index: int) -> None:
    """Make ``stream`` wait for what a feed's own stream is still writing."""
    if feed_stream is None or feed_stream == (stream or 1):
        return
    event = native().Event(index, timing=False)  # orders streams within a capture
    event.record(feed_stream)
    event.wait(stream)


def read_feed(name: str, array: Any) -> DeviceFeed:
    """Read an array's ``__cuda_array_interface__``."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise DeviceError(
            f"{name}: expected an array on the GPU (DeviceArray or __cuda_array_interface__), got "
            f"{type(array).__name__}. Copy it with DeviceArray.from_numpy."
        )
    dtype, shape = _dtype_name(name, interface["typestr"]), tuple(interface["shape"])
    address = int(interface["data"][0])
    itemsize = int(re.sub(r"\D", "", interface["typestr"]))
    if interface.get("strides") not in (None, _packed_strides(shape, itemsize)):
        raise ShapeError(f"{name}: expected a C-contiguous array, got other strides. Copy it.")
    if address % ADDRESS_ALIGNMENT:
        raise ShapeError(
            f"{name}: expected an address aligned to {ADDRESS_ALIGNMENT} bytes, got a slice of a "
            "larger array. Copy it to an array of its own."
        )
    return DeviceFeed(address=address, dtype=dtype, shape=shape, stream=interface.get("stream"))


def _dtype_name(name: str, typestr: str) -> str:
    kinds = {"f": "float", "i": "int", "u": "uint", "b": "bool"}
    kind, width = typestr[1], typestr[2:]
    if typestr == typestr_of("bfloat16"):
        return "bfloat16"
    if typestr[0] not in "<|=" or kind not in kinds:
        raise DTypeError(f"{name}: expected native numbers, got dtype {typestr!r}. Convert it.")
    return "bool" if kind == "b" else f"{kinds[kind]}{int(width) * 8}"


def _packed_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
