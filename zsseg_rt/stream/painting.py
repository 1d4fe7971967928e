"""Labels laid over frames, with their names, for the sinks that show them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import CudaError
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.results.visualize.plot import NamePlace, draw_names, legend_strip
from zsseg_rt.runtime.inputs.nv12 import Nv12Frame
from zsseg_rt.stream.writers import frame_of

_NARROWEST = 320  # columns: names would cover a narrower frame
_LOOKED_AT = 320  # columns in which parts are sought: names need no more
_SMALLEST_PART = 1 / 50  # of the frame: names on small ones would come and go
_LEGEND_LINES = 2  # always, so that a video keeps its size
_log = logging.getLogger(__name__)
_Take = Callable[[core.DeviceArray, int], Any]


class Painter:
    """Lays each label's colour over its frame, and the names of large parts.

    Frames on a GPU are painted there, names and legend too; if that fails, on the CPU from then on,
    with one warning. A name stays where it was in the last frame while it has room there. Frames
    narrower than 320 pixels carry no names. Used by one thread.

    Args:
        channel_order: Of the frames.
        alpha: Weight of the colours, in [0, 1].
        legend: Whether two lines below the frame say what the colours are; the smallest classes
            are left out if there is no room.

    Raises:
        BackendUnavailableError: OpenCV is not installed.
    """

    def __init__(self, *, channel_order: str, alpha: float, legend: bool = False) -> None:
        import_opencv("to write names on overlays")
        self._order, self._alpha, self._has_legend = channel_order, alpha, legend
        self._names: tuple[str, ...] = ()
        self._colours = palette(())
        self._places: dict[str, list[NamePlace]] = {}  # per source
        self._gpu = GpuPainter(channel_order, alpha)
        self.painted: str | None = None
        """Where the newest frame was painted: ``"cpu"`` or ``"gpu"``; None before the first."""

    def canvas(self, seg: Segmentation) -> npt.NDArray[np.uint8]:
        """A new picture to paint on, uint8 [H', W, 3], for frames of this one's size.

        It is pinned memory if the frame is on a GPU.
        """
        height, width = seg.labels.shape
        below = len(legend_strip(width, (), lines=_LEGEND_LINES)) if self._has_legend else 0
        return self._gpu.canvas(frame_of(seg).on_gpu, (height + below, width, 3))

    def paint(self, seg: Segmentation, out: npt.NDArray[np.uint8]) -> None:
        """Paint a result's overlay; from a GPU, the finished picture is fetched in one copy.

        Shapes:
            out: uint8 [H', W, 3], as :meth:`canvas` makes it.
        """
        if self._on_gpu(seg, _fetch_to(out)):
            return
        picture, colours = out[: len(seg.labels)], self._palette(seg.names)
        ops.overlay(frame_of(seg).image, seg.labels, colours, alpha=self._alpha, out=picture)
        self._write_names(seg, picture)
        if self._has_legend:
            out[len(seg.labels) :] = self._strip(seg)
        self.painted = "cpu"

    def planes(self, seg: Segmentation, colour_matrix: str) -> tuple[Any, ...] | None:
        """The picture of :meth:`paint` as NV12 on the frame's GPU; no pixel leaves it.

        Args:
            seg: A result.
            colour_matrix: As for :func:`zsseg_rt.ops.yuv420`.

        Returns:
            The planes, finished; None if the frame is not on a GPU, or painting there has failed:
            then use :meth:`paint`.
        """
        take = self._gpu.planes_of(layout="nv12", colour_matrix=colour_matrix)
        found: tuple[Any, ...] | None = self._on_gpu(seg, take)
        return found

    def _on_gpu(self, seg: Segmentation, take: _Take) -> Any:
        """What is taken of the picture on the frame's GPU; None if it was not painted there."""
        on_gpu = frame_of(seg).on_gpu  # another thread may let it leave
        if on_gpu is None or self._gpu.has_failed:
            return None
        found = self._gpu.painted(
            on_gpu,
            seg.labels,
            self._palette(seg.names),
            take,
            write=lambda picture, stream: self._write_names(seg, picture, stream),
            below=self._strip(seg) if self._has_legend else None,
        )
        self.painted = "gpu" if found is not None else self.painted
        return found

    def _write_names(self, seg: Segmentation, picture: Any, stream: int = 0) -> None:
        if seg.labels.shape[1] >= _NARROWEST:
            source = frame_of(seg).source
            before = self._places.get(source, [])
            self._places[source] = _draw_names(seg, picture, before, stream)

    def _strip(self, seg: Segmentation) -> npt.NDArray[np.uint8]:
        coloured = replace(seg, channel_order=self._order)
        return legend_strip(seg.labels.shape[1], coloured.legend(), lines=_LEGEND_LINES)

    def _palette(self, names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
        if self._names != names:
            self._colours, self._names = palette(names, self._order), names
        return self._colours


def device_of(frame: Any) -> str:
    """Where a frame's GPU copy lies, ``"cuda:N"``; ``"cpu"`` for None."""
    array = frame.luma if isinstance(frame, Nv12Frame) else frame
    return "cpu" if array is None else str(array.device)


class GpuPainter:
    """Paints frames on a GPU where they are, in one thread, on a stream of its own.

    Once that has failed, of which one warning tells, it paints nothing more.
    """

    def __init__(self, channel_order: str, alpha: float) -> None:
        self._order, self._alpha = channel_order, alpha
        self._index = 0
        self.has_failed = False
        """Whether nothing is painted any more."""
        self._stream: Any = None

    def canvas(self, frame: Any, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        """A new picture, in pinned memory if the frame is on a GPU: one of ours, not None."""
        pinned = self._tried(
            frame, lambda _: core.PinnedArray(shape, "uint8", device=self._index).host
        )
        return np.empty(shape, np.uint8) if pinned is None else np.asarray(pinned)

    def paint(
        self,
        frame: Any,
        labels: npt.NDArray[Any],
        colours: npt.NDArray[np.uint8],
        out: npt.NDArray[np.uint8],
    ) -> bool:
        """Lay colours over a frame; labels go up, the picture comes down, each in one copy.

        Returns:
            Whether ``out`` was painted: not if the frame is None, as on the CPU.
        """
        return self.painted(frame, labels, colours, _fetch_to(out)) is not None

    def planes(
        self, frame: Any, labels: npt.NDArray[Any], colours: npt.NDArray[np.uint8], **how: Any
    ) -> tuple[Any, ...] | None:
        """The same as planes on the GPU, finished; None if nothing was painted.

        Args:
            frame: As for :meth:`paint`, as the next two.
            labels: Of its pixels.
            colours: Of the labels.
            how: ``layout`` and ``colour_matrix`` of :func:`zsseg_rt.ops.yuv420`.
        """
        found: tuple[Any, ...] | None = self.painted(frame, labels, colours, self.planes_of(**how))
        return found

    def planes_of(self, **how: Any) -> _Take:
        """What takes finished planes of a picture; settings as of :func:`zsseg_rt.ops.yuv420`."""

        def planes(picture: core.DeviceArray, stream: int) -> tuple[Any, ...]:
            found = ops.yuv420(picture, channel_order=self._order, stream=stream, **how)
            self._stream.synchronize()
            return found

        return planes

    def painted(
        self,
        frame: Any,
        labels: npt.NDArray[Any],
        colours: npt.NDArray[np.uint8],
        take: _Take,
        *,
        write: Callable[[core.DeviceArray, int], None] | None = None,
        below: npt.NDArray[np.uint8] | None = None,
    ) -> Any:
        """Paint a frame where it is; labels go up in one copy.

        Args:
            frame: On a GPU, or None.
            labels: Of its pixels.
            colours: Of the labels.
            take: Gets the picture, uint8 [H', W, 3], and the stream on which it is painted.
            write: Writes on the part with the frame.
            below: A strip to put below it, uint8 [H' - H, W, 3].

        Returns:
            What was taken; None if nothing was painted, as of None.
        """
        height, width = labels.shape
        whole = (height + (0 if below is None else len(below)), width, 3)

        def work(stream: int) -> Any:
            placed = [
                core.DeviceArray.from_numpy(one, self._index, stream) for one in (labels, colours)
            ]
            planes = isinstance(frame, Nv12Frame)
            picture = core.DeviceArray.empty(whole, "uint8", self._index, stream)
            upper = picture.view((height, width, 3))
            ops.overlay(
                (frame.luma, frame.chroma) if planes else frame,
                *placed,
                alpha=self._alpha,
                channel_order=self._order,
                colour_matrix=frame.colour_matrix if planes else "bt601",
                out=upper,
                stream=stream,
            )
            if write is not None:
                write(upper, stream)
            if below is not None:
                picture.view(below.shape, first=labels.size * 3).copy_from(below, stream)
            return take(picture, stream)

        return self._tried(frame, work)

    def _tried(self, frame: Any, work: Callable[[int], Any]) -> Any:
        """What work on the frame's GPU gives; None without one."""
        if frame is None or self.has_failed:
            return None
        try:
            if self._stream is None:
                array = frame.luma if isinstance(frame, Nv12Frame) else frame
                self._index = int(array.device.partition(":")[2])
                self._stream = core.Stream(self._index)
            return work(self._stream.handle)
        except CudaError as exc:
            self.has_failed, self._stream = True, None
            _log.warning("overlays are painted on the CPU from now on: %s", exc)
            return None


def _fetch_to(out: npt.NDArray[np.uint8]) -> _Take:
    def fetch(picture: core.DeviceArray, stream: int) -> bool:
        picture.copy_to(out, stream)
        return True

    return fetch


def _draw_names(
    seg: Segmentation, picture: Any, before: list[NamePlace], stream: int
) -> list[NamePlace]:
    step = max(1, seg.labels.shape[1] // _LOOKED_AT)
    labels = np.ascontiguousarray(seg.labels[::step, ::step])
    coarse = replace(seg, labels=labels, scores=None, class_scores=None, frame=None)
    parts = coarse.components(min_area=max(1, round(labels.size * _SMALLEST_PART)))
    found = [(part.name, part.mask, (part.box[0], part.box[1])) for part in parts]
    return draw_names(picture, found, step=step, before=before, stream=stream)
