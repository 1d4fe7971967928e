"""JPEGs by NVIDIA's encoder, where GStreamer has it."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import BackendError, BackendUnavailableError
from zsseg_rt.stream.gstreamer.frames import buffer_of
from zsseg_rt.stream.gstreamer.library import load, missing_elements

ENCODER = "nvjpegenc"
"""nvJPEG in GStreamer's plugin nvcodec (1.24), a board's encoder on a Jetson. Both take I420 of the
CPU's memory and ``quality``."""

_ELEMENTS = (ENCODER, "appsrc", "videoconvert", "appsink")
_LOOK, _LOOKS = 50_000_000, 200  # nanoseconds: 10 s, for the first picture makes a CUDA context
_MOST_SIZES = 4
_FULL_BT601 = "1:4:0:0"  # GStreamer's text for the colours of a JPEG
_log = logging.getLogger(__name__)

_Pipeline = tuple[Any, Any, Any]  # with its appsrc and its appsink


def has_nvjpeg(gst: Any) -> bool:
    """Whether NVIDIA's encoder can be used."""
    return not missing_elements(gst, _ELEMENTS)


def open_nvjpeg(quality: int) -> NvJpeg | None:
    """NVIDIA's encoder; None without GStreamer or the element."""
    try:
        gst = load().Gst
    except BackendUnavailableError:
        return None
    return NvJpeg(gst, quality) if has_nvjpeg(gst) else None


class NvJpeg:
    """Encodes images with ``nvjpegenc``, in one thread."""

    def __init__(self, gst: Any, quality: int) -> None:
        self._gst, self._quality, self._has_failed = gst, quality, False
        self._pipelines: dict[tuple[int, int, str], _Pipeline] = {}
        weakref.finalize(self, _stop, gst, self._pipelines)

    def encode(self, image: npt.NDArray[np.uint8], channel_order: str) -> bytes | None:
        """A JPEG of an image, uint8 [H, W, 3].

        Returns:
            None for odd sides, and for every image once it has failed, of which a warning tells.
        """
        from gi.repository import GLib

        height, width = image.shape[:2]
        if self._has_failed or height % 2 or width % 2:
            return None
        try:
            return self._encoded(image, (height, width, channel_order.upper()))
        except (BackendError, GLib.Error) as exc:
            self._has_failed = True
            _stop(self._gst, self._pipelines)
            _log.warning("JPEGs are encoded on the CPU from now on: %s", exc)
            return None

    def _encoded(self, image: npt.NDArray[np.uint8], kind: tuple[int, int, str]) -> bytes:
        pipeline, source, sink = self._pipeline(kind)
        source.emit("push-buffer", buffer_of(self._gst, image))
        for _ in range(_LOOKS):
            sample = sink.emit("try-pull-sample", _LOOK)
            if sample is not None:
                buffer = sample.get_buffer()
                return bytes(buffer.extract_dup(0, buffer.get_size()))
            error = pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
            if error is not None:
                raise BackendError(f"{ENCODER}: {error.parse_error()[0].message}")
        raise BackendError(f"{ENCODER}: gave nothing for 10 s")

    def _pipeline(self, kind: tuple[int, int, str]) -> _Pipeline:
        """One per size, of the sizes seen last."""
        found = self._pipelines.pop(kind, None) or self._begin(kind)
        self._pipelines[kind] = found
        if len(self._pipelines) > _MOST_SIZES:
            self._pipelines.pop(next(iter(self._pipelines)))[0].set_state(self._gst.State.NULL)
        return found

    def _begin(self, kind: tuple[int, int, str]) -> _Pipeline:
        height, width, order = kind
        caps = f"video/x-raw,format={order},width={width},height={height},framerate=0/1"
        pipeline = self._gst.parse_launch(
            f'appsrc name=source format=time caps="{caps}" ! videoconvert '
            f"! video/x-raw,format=I420,colorimetry={_FULL_BT601} "
            f"! {ENCODER} quality={self._quality} ! appsink name=sink sync=false"
        )
        pipeline.set_state(self._gst.State.PLAYING)
        return pipeline, pipeline.get_by_name("source"), pipeline.get_by_name("sink")


def _stop(gst: Any, pipelines: dict[tuple[int, int, str], _Pipeline]) -> None:
    for pipeline, *_ in pipelines.values():
        pipeline.set_state(gst.State.NULL)
    pipelines.clear()
