"""From GStreamer's samples to pictures."""

from __future__ import annotations

import ctypes as c
import functools
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.stream.gstreamer.library import Library
from zsseg_rt.stream.gstreamer.messages import NotMappedError

_MAP_READ = 1  # GST_MAP_READ
_pointer = c.c_void_p
_SECOND = 1e9  # GStreamer's times are in nanoseconds
_SLACK = 10.0  # seconds; a frame whose stamp is further off was not stamped with our clock


class MapInfo(c.Structure):
    """GstMapInfo."""

    _fields_ = (
        ("memory", _pointer), ("flags", c.c_int), ("data", _pointer), ("size", c.c_size_t),
        ("maxsize", c.c_size_t), ("user_data", _pointer * 4), ("reserved", _pointer * 4),
    )  # fmt: skip


def copy_image(library: Library, sample: Any) -> npt.NDArray[np.uint8]:
    """The pixels of a sample in RGB or BGR, as an array of our own.

    Returns:
        uint8 [H, W, 3].
    """
    with host_planes(library, sample) as (planes, _):
        image: npt.NDArray[np.uint8] = planes[0].copy()
        return image


def buffer_of(gst: Any, image: npt.NDArray[np.uint8]) -> Any:
    """A buffer that holds a copy of an image, uint8 [H, W, 3]."""
    from gi.repository import GLib

    padding = -3 * image.shape[1] % 4  # GStreamer's rows begin at multiples of 4 bytes
    rows = image.reshape(image.shape[0], -1)
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return gst.Buffer.new_wrapped_bytes(GLib.Bytes.new(rows.tobytes()))


@contextmanager
def host_planes(library: Library, sample: Any) -> Iterator[tuple[list[Any], str | None]]:
    """The planes of a sample and their colour matrix, to be read inside the block.

    Returns:
        uint8 [H, W, 3], or [H, W] and one [H / 2, W / 2, 2] of NV12 or two [H / 2, W / 2] of I420.
    """
    info = library.GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    buffer = sample.get_buffer()
    meta = library.GstVideo.buffer_get_video_meta(buffer)
    layout, half = info if meta is None else meta, (info.height // 2, info.width // 2)
    shapes: list[tuple[int, ...]] = [(info.height, info.width, 3)]
    if info.finfo.name in ("NV12", "I420"):
        chroma = [(*half, 2)] if info.finfo.name == "NV12" else [half, half]
        shapes = [(info.height, info.width), *chroma]
    with mapped(buffer) as memory:
        data = np.ctypeslib.as_array((c.c_uint8 * memory.size).from_address(memory.data))
        planes = []
        for shape, stride, offset in zip(shapes, layout.stride, layout.offset, strict=False):
            strides = (stride, *shape[2:], 1)
            planes.append(np.lib.stride_tricks.as_strided(data[offset:], shape, strides))
        yield planes, matrix_of(library.GstVideo, info)


def mapped(buffer: Any, flags: int = 0) -> AbstractContextManager[MapInfo]:
    """A buffer's memory, to be read inside the block; PyGObject would copy it."""
    address = c.c_void_p(hash(buffer))  # PyGObject's hash is the C address
    return mapped_at(address, _MAP_READ | flags)


@contextmanager
def mapped_at(address: c.c_void_p, flags: int) -> Iterator[MapInfo]:
    """The memory of the buffer at an address, inside the block."""
    library, info = _gstreamer(), MapInfo()
    if library.gst_buffer_map(address, c.byref(info), flags) != 1:
        raise NotMappedError("gst_buffer_map: refused")
    try:
        yield info
    finally:
        library.gst_buffer_unmap(address, c.byref(info))


@functools.cache
def _gstreamer() -> c.CDLL:
    return c.CDLL("libgstreamer-1.0.so.0")


def matrix_of(video: Any, info: Any) -> str | None:
    """The colour matrix of a video, as ``Nv12Frame`` calls it; None for those that it lacks."""
    matrices = {video.VideoColorMatrix.BT601: "bt601", video.VideoColorMatrix.BT709: "bt709"}
    found = matrices.get(info.colorimetry.matrix)
    is_full = info.colorimetry.range.value_nick == "0-255"
    return f"{found}-full" if found and is_full else found


def stamp_of(library: Library, sample: Any, base_time: int) -> float | None:
    """When a live pipeline says that a sample was captured, seconds of ``time.monotonic()``.

    Pipelines here run on the system's clock, CLOCK_MONOTONIC, and live sources stamp their frames
    with the time that has run on it since ``base_time``.

    Returns:
        None if there is no stamp, or it cannot be one of that clock. A stamp that lies ahead, as
        smoothed stamps of network streams may, counts as now.
    """
    gst, stamp = library.Gst, sample.get_buffer().pts
    if stamp == gst.CLOCK_TIME_NONE:
        return None
    running = sample.get_segment().to_running_time(gst.Format.TIME, stamp)
    if running == gst.CLOCK_TIME_NONE:
        return None
    now, seconds = time.monotonic(), (base_time + running) / _SECOND
    return min(seconds, now) if abs(now - seconds) < _SLACK else None


class Arrivals:
    """When encoded frames arrived, found again by their time stamps when they are decoded."""

    def __init__(self) -> None:
        self._known: deque[tuple[int, float]] = deque(maxlen=64)
        self._lock = threading.Lock()

    def note(self, stamp: int) -> None:
        """A frame with this time stamp arrived now."""
        with self._lock:
            self._known.append((stamp, time.monotonic()))

    def take(self, stamp: int) -> float | None:
        """When the frame arrived, seconds of ``time.monotonic()``; None if that is not known.

        Several frames may have one stamp, where the network's jitter is smoothed out.
        """
        with self._lock:
            for place, (known, at) in enumerate(self._known):
                if known == stamp:
                    del self._known[place]
                    return at
        return None
