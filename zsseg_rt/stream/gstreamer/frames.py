"""From GStreamer's samples to pictures."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.stream.gstreamer.library import Library

_SECOND = 1e9  # GStreamer's times are in nanoseconds
_SLACK = 10.0  # seconds; a frame whose stamp is further off was not stamped with our clock


def copy_image(library: Library, sample: Any) -> npt.NDArray[np.uint8]:
    """The pixels of a sample in RGB or BGR, as an array of our own.

    Returns:
        uint8 [H, W, 3].
    """
    info = library.GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    buffer = sample.get_buffer()
    meta = library.GstVideo.buffer_get_video_meta(buffer)
    stride, offset = (
        (info if meta is None else meta).stride[0],
        (info if meta is None else meta).offset[0],
    )
    _, mapped = buffer.map(library.Gst.MapFlags.READ)
    try:
        data = np.frombuffer(mapped.data, np.uint8)
        shape, strides = (info.height, info.width, 3), (stride, 3, 1)
        return np.lib.stride_tricks.as_strided(data[offset:], shape, strides).copy()
    finally:
        buffer.unmap(mapped)


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
