"""JPEGs by NVIDIA's encoder, where GStreamer has it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import BackendError, BackendUnavailableError, ZssegError
from zsseg_rt.stream.gstreamer.frames import buffer_of
from zsseg_rt.stream.gstreamer.gpu_pictures import COLOURS, GpuPictures, path_to
from zsseg_rt.stream.gstreamer.library import Library, known_settings, load, missing_elements
from zsseg_rt.stream.gstreamer.nvidia import FEATURES

ENCODER = "nvjpegenc"
"""nvJPEG in GStreamer's plugin nvcodec (1.24), a board's encoder on a Jetson. Both take I420 of the
CPU's memory and of the GPU's, and ``quality``."""
MATRIX = "bt601-full"
"""The colours of a JPEG."""

_ELEMENTS = (ENCODER, "appsrc", "videoconvert", "appsink")
_SCALERS = {"cuda": "cudascale", "nvmm": "nvvidconv"}
_LOOK, _LOOKS = 50_000_000, 200  # nanoseconds: 10 s, for the first picture makes a CUDA context
_MOST_SIZES = 4
_log = logging.getLogger(__name__)


class _Pipeline(NamedTuple):
    element: Any
    source: Any
    sink: Any
    pictures: GpuPictures | None


def has_nvjpeg(gst: Any) -> bool:
    """Whether NVIDIA's encoder can be used."""
    return not missing_elements(gst, _ELEMENTS)


def open_nvjpeg(quality: int, device: str) -> NvJpeg | None:
    """NVIDIA's encoder for an engine on a GPU; None without GStreamer or the element."""
    try:
        library = load()
    except BackendUnavailableError:
        return None
    return NvJpeg(library, quality, device) if has_nvjpeg(library.Gst) else None


class NvJpeg:
    """Encodes images with ``nvjpegenc``, in one thread."""

    def __init__(self, library: Library, quality: int, device: str) -> None:
        self._library, self._gst, self._device = library, library.Gst, device
        self._quality, self._has_failed = quality, False
        self._path = path_to(library.Gst, ENCODER)
        self._pipelines: dict[tuple[Any, ...], _Pipeline] = {}
        weakref.finalize(self, _stop, self._gst, self._pipelines)

    def encode(self, image: npt.NDArray[np.uint8], channel_order: str) -> bytes | None:
        """A JPEG of an image, uint8 [H, W, 3].

        Returns:
            None for odd sides, and for every image once it has failed, of which a warning tells.
        """
        height, width = image.shape[:2]
        if self._has_failed or height % 2 or width % 2:
            return None
        kind = (height, width, channel_order.upper())
        found = self._tried(kind, self._from_host, lambda _: buffer_of(self._gst, image))
        if isinstance(found, bytes):
            return found
        self._has_failed = True
        _log.warning("JPEGs are encoded on the CPU from now on: %s", found)
        return None

    def takes_planes(self, shape: tuple[int, ...], size_hw: tuple[int, int]) -> bool:
        """Whether it takes a picture on the GPU, to be made smaller if the sizes differ."""
        scales = size_hw == shape or not missing_elements(self._gst, [_SCALERS.get(self._path, "")])
        is_even = not any(side % 2 for side in (*shape, *size_hw))
        return self._path != "host" and is_even and scales and not self._has_failed

    def encode_planes(self, planes: Sequence[Any], size_hw: tuple[int, int]) -> bytes | None:
        """A JPEG of this size, of planes on the GPU in the colours of :data:`MATRIX`.

        Shapes:
            planes: uint8 [H, W] and two [H / 2, W / 2], such as :meth:`takes_planes` allows.

        Returns:
            None if it failed, of which a warning tells; it takes no planes any more then.
        """
        kind = (planes[0].shape[0], planes[0].shape[1], *size_hw)

        def buffer(pipeline: _Pipeline) -> Any:
            assert pipeline.pictures is not None
            return pipeline.pictures.buffer(planes, MATRIX)

        found = self._tried(kind, self._from_gpu, buffer)
        if isinstance(found, bytes):
            return found
        self._path = "host"
        _log.warning("overlays reach %s through the CPU's memory: %s", ENCODER, found)
        return None

    def _tried(
        self,
        kind: tuple[Any, ...],
        begin: Callable[..., _Pipeline],
        buffer: Callable[[_Pipeline], Any],
    ) -> bytes | str:
        """A JPEG, or what went wrong."""
        from gi.repository import GLib

        try:
            pipeline = self._pipeline(kind, begin)
            pipeline.source.emit("push-buffer", buffer(pipeline))
            return self._pulled(pipeline)
        except (ZssegError, GLib.Error) as exc:
            _stop(self._gst, self._pipelines)
            return str(exc)

    def _pulled(self, pipeline: _Pipeline) -> bytes:
        for _ in range(_LOOKS):
            sample = pipeline.sink.emit("try-pull-sample", _LOOK)
            if sample is not None:
                buffer = sample.get_buffer()
                return bytes(buffer.extract_dup(0, buffer.get_size()))
            error = pipeline.element.get_bus().pop_filtered(self._gst.MessageType.ERROR)
            if error is not None:
                raise BackendError(f"{ENCODER}: {error.parse_error()[0].message}")
        raise BackendError(f"{ENCODER}: gave nothing for 10 s")

    def _pipeline(self, kind: tuple[Any, ...], begin: Callable[..., _Pipeline]) -> _Pipeline:
        """One per size, of the sizes seen last."""
        found = self._pipelines.pop(kind, None) or begin(*kind)
        self._pipelines[kind] = found
        if len(self._pipelines) > _MOST_SIZES:
            oldest = next(iter(self._pipelines))
            _stop(self._gst, {oldest: self._pipelines.pop(oldest)})
        return found

    def _from_host(self, height: int, width: int, order: str) -> _Pipeline:
        return self._begin(
            f"video/x-raw,format={order},width={width},height={height},framerate=0/1",
            f"videoconvert ! video/x-raw,format=I420,colorimetry={COLOURS[MATRIX]} ! ",
        )

    def _from_gpu(self, height: int, width: int, to_height: int, to_width: int) -> _Pipeline:
        pictures, scale = GpuPictures(self._library, self._path, self._device, "I420"), ""
        if (height, width) != (to_height, to_width):
            scaler = _SCALERS[self._path]
            settings = known_settings(self._gst, scaler, {"interpolation-method": 2})  # of 5 taps
            scale = (
                f"{scaler} {settings} "
                f"! video/x-raw({FEATURES[self._path]}),width={to_width},height={to_height} ! "
            )
        return self._begin(pictures.caps((height, width), MATRIX, 0), scale, pictures)

    def _begin(self, caps: str, before: str, pictures: GpuPictures | None = None) -> _Pipeline:
        pipeline = self._gst.parse_launch(
            f'appsrc name=source format=time caps="{caps}" ! {before}'
            f"{ENCODER} quality={self._quality} ! appsink name=sink sync=false"
        )
        if pictures is not None:
            pictures.lend_context(pipeline)
        pipeline.set_state(self._gst.State.PLAYING)
        source, sink = (pipeline.get_by_name(name) for name in ("source", "sink"))
        return _Pipeline(pipeline, source, sink, pictures)


def _stop(gst: Any, pipelines: dict[tuple[Any, ...], _Pipeline]) -> None:
    for pipeline in pipelines.values():
        pipeline.element.set_state(gst.State.NULL)
        if pipeline.pictures is not None:
            pipeline.pictures.close()
    pipelines.clear()
