"""One lane's buffers, reused from frame to frame, their stream, and the clock of its stages.

On CUDA, frames come from pinned memory and results go there: copies then need no help of the host.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array, dtype_name, reshaped
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.ops import core

_MOST_FRAME_BUFFERS = 8
MOST_LENT = 32  # results in pinned memory that callers hold at the same time

STAGES = (
    "compare",
    "preprocess",
    "image_encoder",
    "descriptor",
    "decoder",
    "similarity",
    "regions",
    "check",
    "steady",
    "candidates",
    "upsample_argmax",
    "results",
)
"""Every stage that a family may have, in the order a frame passes them."""


class Workspace:
    """Named buffers on ``"cpu"`` or ``"cuda:N"``, grown to the largest size asked for.

    A buffer's content lasts until the same name is asked for again.
    """

    def __init__(
        self,
        device: str,
        *,
        sleeps: bool | None = False,
        with_times: bool | None = False,
        with_nvtx: bool = False,
    ) -> None:
        self.device = device
        self._index = None if device == "cpu" else int(device.split(":")[1])
        self._buffers: dict[str, Any] = {}
        self._frames: dict[tuple[int, ...], Any] = {}  # pinned arrays by frame shape, oldest first
        self._lent: list[weakref.ref[Any]] = []
        self.generation = 0
        """Grows when a buffer moves: captures made before use memory that is no longer its."""
        self._stream = None if self._index is None else core.Stream(self._index, sleeps=sleeps)
        ranges = NvtxRanges() if with_nvtx else None
        self.clock = StageClock(self._stream, enabled=with_times, ranges=ranges)
        """Times the frames on this stream."""

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that all work of this lane is enqueued on; 0 on the CPU."""
        return 0 if self._stream is None else int(self._stream.handle)

    @cached_property
    def reads_in_place(self) -> bool:
        """Whether the GPU shares the host's memory."""
        return bool(core.cuda_device_properties(self._index or 0)["integrated"])

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An uninitialised buffer of this shape on the device; on CUDA also of "bfloat16"."""
        size = math.prod(shape)
        buffer = self._buffer(name, size, dtype, self._allocate)
        return reshaped(buffer[:size] if self._index is None else buffer, shape)

    def new_array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An uninitialised array on the device that the caller keeps."""
        return self._allocate(shape, dtype_name(dtype))

    def place(self, host: npt.NDArray[Any]) -> Array:
        """Copy a host array to a device array of its own; on the CPU return it as it is."""
        if self._index is None:
            return host
        placed = core.DeviceArray.from_numpy(host, device=self._index, stream=self.stream)
        self.synchronize()
        return placed

    def copy(self, array: Array) -> Array:
        """Copy a device array of ours to one that the caller keeps, on the stream."""
        copied = self.new_array(array.shape, array.dtype)
        copied.copy_from(array, stream=self.stream)
        return copied

    def upload(self, name: str, host: npt.NDArray[Any]) -> Array:
        """Copy a host array into the named buffer; on the CPU return it as it is."""
        if self._index is None:
            return host
        buffer = self.array(name, host.shape, host.dtype)
        buffer.copy_from(host, stream=self.stream)
        return buffer

    def frame_buffer(self, *shape: int) -> npt.NDArray[np.uint8]:
        """Where frames of this shape are copied from: pinned memory, the same at every call.

        Of eight shapes at most; the one that was asked for longest ago is dropped.
        """
        if self._index is None:
            return np.empty(shape, np.uint8)
        pinned = self._frames.pop(shape, None)
        if pinned is None:
            pinned = core.PinnedArray(shape, "uint8", device=self._index)
            for oldest in list(self._frames)[: max(0, len(self._frames) + 1 - _MOST_FRAME_BUFFERS)]:
                del self._frames[oldest]
        self._frames[shape] = pinned
        host: npt.NDArray[np.uint8] = pinned.host
        return host

    def upload_frame(self, frame: npt.NDArray[np.uint8], name: str = "frame") -> Array:
        """A frame, or a plane, on the device, by way of its frame buffer; on the CPU as it is."""
        if self._index is None:
            return frame
        staged = self.frame_buffer(*frame.shape)
        if not np.may_share_memory(frame, staged):
            np.copyto(staged, frame)
        if self.reads_in_place:
            return self._frames[frame.shape].mapped(self.stream)
        return self.upload(name, staged)

    def flag(self) -> tuple[npt.NDArray[np.uint8], Array]:
        """A byte that the device writes and the host reads after a wait, as both see it."""
        if "flag" not in self._buffers:
            if self._index is None:
                self._buffers["flag"] = (np.empty(1, np.uint8),) * 2
            else:
                pinned = core.PinnedArray((1,), "uint8", device=self._index)
                self._buffers["flag"] = pinned.host, pinned.mapped(self.stream)
        flag: tuple[npt.NDArray[np.uint8], Array] = self._buffers["flag"]
        return flag

    def products(self) -> Array | None:
        """Memory of products, shared by blocks: zeros that kernels leave zeros; None on the CPU."""
        if self._index is None:
            return None
        if "products" not in self._buffers:
            self._buffers["products"] = self.place(np.zeros(core.DEPTH_WORKSPACE_BYTES, np.uint8))
        return self._buffers["products"]

    def own(self, name: str, array: Array) -> Array:
        """A float32 array where it is ours, else a copy of :meth:`keep`."""
        is_ours = self._index is None or isinstance(array, core.DeviceArray)
        return array if is_ours else self.keep(name, array)

    def keep(self, name: str, array: Array) -> Array:
        """Copy a float32 array of the device to the named buffer, on the stream."""
        buffer: Any = self.array(name, tuple(array.shape), np.float32)
        if self._index is None:
            np.copyto(buffer, array)
        else:
            buffer.copy_from(array, stream=self.stream)
        return buffer

    def copy_rows(self, rows: Array, out: Any, first: int) -> None:
        """Copy rows [1, R, h, w] of ours to an array [1, P, h, w], from its row ``first`` on."""
        if self._index is None:
            np.copyto(out[:, first : first + rows.shape[1]], rows)
        else:
            begin = first * math.prod(rows.shape[2:])
            out.view(rows.shape, first=begin).copy_from(rows, stream=self.stream)

    def on_host(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialised buffer in host memory, on CUDA pinned, for copies either way."""
        if self._index is None:
            return np.asarray(self.array(f"{name} on the host", shape, dtype))
        size = math.prod(shape)
        pin = partial(core.PinnedArray, device=self._index)
        flat: npt.NDArray[Any] = self._buffer(f"{name} on the host", size, dtype, pin).host
        return flat[:size].reshape(shape)

    def copy_out(self, array: Array, out: npt.NDArray[Any]) -> None:
        """Begin to copy an array of ours to a part of a buffer of :meth:`on_host`."""
        if self._index is None:
            np.copyto(out, array)
        else:
            array.copy_to(out, self.stream, wait=False)

    def read_back(self, name: str, array: Array) -> npt.NDArray[Any]:
        """Begin to copy an array to the named buffer on the host, whole after a wait.

        It is overwritten when the name is used again, so captures may hold the copy. Arrays of
        other libraries are float32.
        """
        array = self.own(name, array)
        if self._index is None:
            return np.asarray(array)
        out = self.on_host(name, array.shape, array.dtype)
        self.copy_out(array, out)
        return out

    def download(self, array: Array) -> npt.NDArray[Any]:
        """Begin to copy a device array to a fresh host array, which is whole after a wait.

        It is pinned memory, unless many such arrays are still held; then the copy is waited for.
        """
        if self._index is None:
            return np.asarray(array)
        self._lent = [lent for lent in self._lent if lent() is not None]
        if len(self._lent) >= MOST_LENT:
            return self.fetch(array)
        host: npt.NDArray[Any] = core.PinnedArray(array.shape, array.dtype, device=self._index).host
        self._lent.append(weakref.ref(host))
        array.copy_to(host, self.stream, wait=False)
        return host

    def fetch(self, array: Array) -> npt.NDArray[Any]:
        """Copy any device array to a fresh host array and wait for it; on the CPU return it."""
        if self._index is None:
            return np.asarray(array)
        if not isinstance(array, core.DeviceArray):  # ours is freed on the stream
            array = core.DeviceArray.from_numpy(array, device=self._index, stream=self.stream)
        host: npt.NDArray[Any] = array.numpy(stream=self.stream)
        return host

    def synchronize(self) -> None:
        """Wait for everything enqueued on the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Free the buffers and the stream."""
        try:
            self.synchronize()
        finally:
            self._buffers.clear()
            self._frames.clear()
            self._stream = None

    def _buffer(
        self, name: str, size: int, dtype: npt.DTypeLike, make: Callable[[tuple[int], str], Any]
    ) -> Any:
        kind = dtype_name(dtype)
        last_kind, last_size, buffer = self._buffers.get(name, ("", 0, None))
        if last_kind != kind or last_size < size:
            buffer = make((size,), kind)
            self._buffers[name] = kind, size, buffer
            self.generation += 1
        return buffer

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        if self._index is None:
            return np.empty(shape, dtype)
        return core.DeviceArray.empty(shape, dtype, device=self._index, stream=self.stream)


class NvtxRanges:
    """Pushes an NVTX range for each frame and, in it, for each stage; Nsight Systems shows them.

    A range needs its name when it begins, and a clock tells stages when they end: a stage is called
    by what followed the one before it in the last frame. A lane's first frame has no stages.
    """

    def __init__(self) -> None:
        with needs_extra("nvtx", "to show ranges"):
            import nvtx
        self._nvtx: Any = nvtx
        self._following: dict[str, str] = {}
        self._last, self._open = "", 0

    def begin_frame(self) -> None:
        """Begin a frame, and its first stage."""
        self.end_frame()
        self._last = "start"
        self._push("frame", self._following.get("start"))

    def end_stage(self, stage: str) -> None:
        """End a stage, and begin the next one."""
        self._following[self._last], self._last = stage, stage
        self._pop(to=1)
        self._push(self._following.get(stage))

    def end_frame(self) -> None:
        """End the frame and what is open in it; of the thread that began it."""
        self._pop(to=0)

    def _push(self, *names: str | None) -> None:
        for name in filter(None, names):
            self._nvtx.push_range(message=name, domain="zsseg_rt")
            self._open += 1

    def _pop(self, *, to: int) -> None:
        while self._open > to:
            self._nvtx.pop_range(domain="zsseg_rt")
            self._open -= 1


class StageClock:
    """Times one lane's frames, one at a time: :meth:`start`, then :meth:`mark` after each stage.

    On CUDA the marks are events on the stream, made once, so that timing does not make the host
    wait; captures hold them as nodes.
    """

    def __init__(
        self,
        stream: Any | None = None,
        *,
        enabled: bool | None = True,
        ranges: NvtxRanges | None = None,
    ) -> None:
        self._stream, self._ranges = stream, ranges
        # None times on CUDA the whole frame alone, by the host's clock
        self._whole_only = enabled is None and stream is not None
        self._enabled = enabled is not False and not self._whole_only
        self._began = 0.0
        self._events: dict[str, Any] = {}
        if self._enabled and stream is not None:
            self._events = {stage: core.Event(stream.device) for stage in ("start", *STAGES)}
        self.marks: list[tuple[str, Any]] = []
        """The marks since :meth:`start`; a replayed capture adds what it recorded."""
        self.is_muted = False
        """Whether marks count for nothing: a stage that is passed repeatedly has one event."""

    def start(self) -> None:
        """Begin a frame."""
        self.marks.clear()
        self.is_muted = False
        if self._ranges is not None:
            self._ranges.begin_frame()
        self._began = time.perf_counter()
        self._note("start")

    def mark(self, stage: str) -> None:
        """End a stage, one of :data:`STAGES`, that began at the previous mark."""
        if self.is_muted:
            return
        if self._ranges is not None:
            self._ranges.end_stage(stage)
        self._note(stage)

    def stop(self) -> None:
        """End the frame, also one that failed. Calling it twice is harmless."""
        if self._ranges is not None:
            self._ranges.end_frame()

    def _note(self, stage: str) -> None:
        if not self._enabled:
            return
        if self._stream is None:
            self.marks.append((stage, time.perf_counter()))
            return
        event = self._events[stage]
        event.record(self._stream.handle)
        self.marks.append((stage, event))

    def times(self) -> dict[str, float]:
        """Milliseconds per stage and ``"total"``; on CUDA the stream must have been waited for."""
        if self._whole_only:
            return {"total": (time.perf_counter() - self._began) * 1000.0}
        if not self._enabled:
            return {}
        marks = self.marks
        stages: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(marks):  # windows pass some repeatedly
            stages[name] = stages.get(name, 0.0) + self._between(before, after)
        return stages | {"total": self._between(marks[0][1], marks[-1][1])}

    def _between(self, before: Any, after: Any) -> float:
        if self._stream is None:
            return float((after - before) * 1000.0)
        return float(before.elapsed_ms(after))
