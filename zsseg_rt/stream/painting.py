"""Labels laid over frames, with their names, for the sinks that show them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.common.arrays import gpu_index
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import CaptureError, CudaError
from zsseg_rt.ops import core
from zsseg_rt.results.plot import NamePlace, draw_names, legend_strip
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.runtime.frames import planes_of
from zsseg_rt.stream.writers import frame_of

_NARROWEST = 320  # columns: names would cover a narrower frame
_LOOKED_AT = 320  # columns in which parts are sought: names need no more
_SMALLEST_PART = 1 / 50  # of the frame: names on small ones would come and go
_LEGEND_LINES = 2  # always, so that a video keeps its size
_log = logging.getLogger(__name__)


class Painter:
    """Lays each label's colour over its frame, and the names of large parts; for one thread.

    Frames on a GPU are painted there and fetched once; names and legend, of two lines below the
    frame, are written on the CPU. A name stays where it was while it has room there.
    """

    def __init__(self, *, channel_order: str, alpha: float, legend: bool = False) -> None:
        import_opencv("to write names on overlays")
        self.channel_order, self._alpha, self._has_legend = channel_order, alpha, legend
        self._places: dict[str, list[NamePlace]] = {}  # per source
        self._gpu = GpuPainter(channel_order, alpha)
        self.painted: str | None = None
        """Where the newest frame was painted: ``"cpu"`` or ``"gpu"``; None before the first."""

    def canvas(self, seg: Segmentation) -> npt.NDArray[np.uint8]:
        """A new image to paint on, uint8 [H', W, 3], for frames of this one's size."""
        height, width = seg.labels.shape
        below = len(legend_strip(width, (), lines=_LEGEND_LINES)) if self._has_legend else 0
        return self._gpu.canvas(frame_of(seg).on_gpu, (height + below, width, 3))

    def paint(self, seg: Segmentation, out: npt.NDArray[np.uint8]) -> None:
        """Paint a result's overlay into ``out``, as :meth:`canvas` makes it."""
        frame, image = frame_of(seg), out[: len(seg.labels)]
        on_gpu = frame.on_gpu  # another thread may let it leave
        colours = palette(seg.names, self.channel_order)
        self.painted = "gpu"
        if not self._gpu.paint(on_gpu, seg.labels, colours, image):
            self.painted = "cpu"
            ops.overlay(frame.image, seg.labels, colours, alpha=self._alpha, out=image)
        if seg.labels.shape[1] >= _NARROWEST:
            before = self._places.get(frame.source, [])
            self._places[frame.source] = _draw_names(seg, image, before)
        if self._has_legend:
            legend = replace(seg, channel_order=self.channel_order).legend()
            strip = legend_strip(seg.labels.shape[1], legend, lines=_LEGEND_LINES)
            out[len(seg.labels) :] = strip


class GpuPainter:
    """Paints frames on a GPU where they are, in one thread; once that has failed, nothing more."""

    def __init__(self, channel_order: str, alpha: float) -> None:
        self._order, self._alpha = channel_order, alpha
        self._index, self.has_failed = 0, False
        self._stream: Any = None

    def canvas(self, frame: Any, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        """A new image, in pinned memory if the frame is on a GPU: one of ours, not None."""
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
        """Lay colours over a frame; labels go up, the image comes down, each in one copy."""

        def work(stream: int) -> bool:
            placed = [
                core.DeviceArray.from_numpy(one, self._index, stream) for one in (labels, colours)
            ]
            image, matrix = planes_of(frame)
            settings = {"alpha": self._alpha, "channel_order": self._order, **matrix}
            ops.overlay(image, *placed, **settings, stream=stream).copy_to(out, stream)
            return True

        return self._tried(frame, work) is not None

    def _tried(self, frame: Any, work: Callable[[int], Any]) -> Any:
        """The result of work on the frame's GPU; None without one."""
        if frame is None or self.has_failed:
            return None
        try:
            if self._stream is None:
                self._index = gpu_index(frame.device)
                self._stream = core.Stream(self._index)
            return core.outside_captures(lambda: work(self._stream.handle))
        except CaptureError:
            return None  # of this frame
        except CudaError as exc:
            self.has_failed, self._stream = True, None
            _log.warning("overlays are painted on the CPU from now on: %s", exc)
            return None


def _draw_names(
    seg: Segmentation, image: npt.NDArray[np.uint8], before: list[NamePlace]
) -> list[NamePlace]:
    step = max(1, seg.labels.shape[1] // _LOOKED_AT)
    labels = np.ascontiguousarray(seg.labels[::step, ::step])
    coarse = replace(seg, labels=labels, scores=None, class_scores=None, frame=None)
    parts = coarse.components(min_area=max(1, round(labels.size * _SMALLEST_PART)))
    named = [(part.name, part.mask, part.box) for part in parts]
    return draw_names(image, named, step=step, before=before)
