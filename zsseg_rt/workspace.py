"""One lane's buffers, reused from frame to frame, and the stream they are used on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import _C
from zsseg_rt.arrays import Array, reshaped
from zsseg_rt.clock import NvtxRanges, StageClock

__all__ = ["Workspace"]


class Workspace:
    """Named buffers on ``"cpu"`` or ``"cuda:N"``, grown to the largest size asked for.

    A buffer's content lasts until the same name is asked for again.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._index = None if device == "cpu" else int(device.split(":")[1])
        self._buffers: dict[str, Any] = {}
        self._stream = None if self._index is None else _C.Stream(self._index)

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that all work of this lane is enqueued on; 0 on the CPU."""
        return 0 if self._stream is None else int(self._stream.handle)

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return an uninitialised buffer of this shape on the device."""
        kind = np.dtype(dtype)
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != kind or math.prod(buffer.shape) < size:
            buffer = self._allocate(size, kind)
            self._buffers[name] = buffer
        return reshaped(buffer[:size] if self._index is None else buffer, shape)

    def new_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return an uninitialised array on the device that the caller keeps."""
        return reshaped(self._allocate(math.prod(shape), np.dtype(dtype)), shape)

    def scratch(self, name: str, size: int) -> Array | None:
        """A buffer of at least ``size`` bytes, of no certain content; None on the CPU."""
        return None if self._index is None else self.array(name, (size,), np.uint8)

    def result(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """Where an operation writes what is fetched at once; None, so a new array, on the CPU."""
        return None if self._index is None else self.array(name, shape, dtype)

    def place(self, host: npt.NDArray[Any]) -> Array:
        """Copy a host array to a device array of its own; on the CPU return it as it is."""
        if self._index is None:
            return host
        placed = _C.DeviceArray.from_numpy(host, device=self._index, stream=self.stream)
        self.synchronize()
        return placed

    def upload(self, name: str, host: npt.NDArray[Any]) -> Array:
        """Copy a host array into the named buffer; on the CPU return it as it is."""
        if self._index is None:
            return host
        buffer = self.array(name, host.shape, host.dtype)
        buffer.copy_from(host, stream=self.stream)
        return buffer

    def fetch(self, array: Array) -> npt.NDArray[Any]:
        """Copy a device array to a fresh host array and wait for it; on the CPU return it.

        A session may return another library's arrays; those are copied through one of ours.
        """
        if self._index is None:
            return np.asarray(array)
        if not isinstance(array, _C.DeviceArray):
            array = _C.DeviceArray.from_numpy(array, device=self._index, stream=self.stream)
        host: npt.NDArray[Any] = array.numpy(stream=self.stream)
        return host

    def synchronize(self) -> None:
        """Wait for everything enqueued on the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def clock(self, *, enabled: bool = True, ranges: NvtxRanges | None = None) -> StageClock:
        """Return a clock for the frames on this stream."""
        return StageClock(self._stream, enabled=enabled, ranges=ranges)

    def close(self) -> None:
        """Free the buffers and the stream."""
        try:
            self.synchronize()
        finally:
            self._buffers.clear()
            self._stream = None

    def _allocate(self, size: int, dtype: np.dtype[Any]) -> Any:
        if self._index is None:
            return np.empty(size, dtype)
        return _C.DeviceArray.empty((size,), dtype.name, device=self._index, stream=self.stream)
