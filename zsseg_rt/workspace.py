"""Buffers on one device that are reused from frame to frame, and the stream they are used on."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import _C
from zsseg_rt.backends.base import Array

__all__ = ["StageClock", "Workspace", "reshaped"]


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
        """Handle of the CUDA stream that all work of this engine is enqueued on; 0 on the CPU."""
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

        A session may hand out another library's arrays; those are copied through one of ours.
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

    def clock(self) -> StageClock:
        """Return a new clock for the stages of one frame."""
        return StageClock(self._stream)

    def close(self) -> None:
        """Free the buffers and the stream."""
        self.synchronize()
        self._buffers.clear()
        self._stream = None

    def _allocate(self, size: int, dtype: np.dtype[Any]) -> Any:
        if self._index is None:
            return np.empty(size, dtype)
        return _C.DeviceArray.empty((size,), dtype.name, device=self._index, stream=self.stream)


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array's leading elements with another shape, no copy, on either kind of device."""
    return array.reshape(shape) if isinstance(array, np.ndarray) else array.view(shape)


class StageClock:
    """Times the stages of one frame: call :meth:`mark` at the end of each.

    On CUDA the marks are events on the stream, so that timing does not make the host wait.
    """

    def __init__(self, stream: Any | None) -> None:
        self._stream = stream
        self._marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, stage: str) -> None:
        """End a stage that began at the previous mark."""
        if self._stream is None:
            self._marks.append((stage, time.perf_counter()))
            return
        event = _C.Event(self._stream.device)
        event.record(self._stream.handle)
        self._marks.append((stage, event))

    def times(self) -> dict[str, float]:
        """Milliseconds a stage and ``"total"``; on CUDA the stream must have been waited for."""
        marks = self._marks
        pairs = itertools.pairwise(marks)
        stages = {name: self._between(before, after) for (_, before), (name, after) in pairs}
        return stages | {"total": self._between(marks[0][1], marks[-1][1])}

    def _between(self, before: Any, after: Any) -> float:
        if self._stream is None:
            return float((after - before) * 1000.0)
        return float(before.elapsed_ms(after))
