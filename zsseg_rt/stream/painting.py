"""Labels laid over frames, with their names, for the sinks that show them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.results.visualize.plot import NamePlace, draw_names, legend_strip
from zsseg_rt.stream.writers import frame_of

_NARROWEST = 320  # columns: names would cover a narrower frame
_LOOKED_AT = 320  # columns in which parts are sought: names need no more
_SMALLEST_PART = 1 / 50  # of the frame: names on small ones would come and go
_LEGEND_LINES = 2  # always, so that a video keeps its size


class Painter:
    """Lays each label's colour over its frame, and the names of large parts.

    A name stays where it was in the last frame while it has room there. Frames narrower than 320
    pixels carry no names.

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

    def canvas(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A new picture to paint on, uint8 [H', W, 3], for frames of this one's size."""
        height, width = frame.shape[:2]
        below = len(legend_strip(width, (), lines=_LEGEND_LINES)) if self._has_legend else 0
        return np.empty((height + below, width, 3), np.uint8)

    def paint(self, seg: Segmentation, out: npt.NDArray[np.uint8]) -> None:
        """Paint a result's overlay.

        Shapes:
            out: uint8 [H', W, 3], as :meth:`canvas` makes it.
        """
        frame, (height, width) = frame_of(seg), seg.labels.shape
        picture = out[:height]
        colours = self._palette(seg.names)
        ops.overlay(frame.image, seg.labels, colours, alpha=self._alpha, out=picture)
        if width >= _NARROWEST:
            self._places[frame.source] = _draw_names(
                seg, picture, self._places.get(frame.source, [])
            )
        if self._has_legend:
            coloured = replace(seg, channel_order=self._order)
            out[height:] = legend_strip(width, coloured.legend(), lines=_LEGEND_LINES)

    def _palette(self, names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
        if self._names != names:
            colours = palette(names)
            self._colours = (
                colours if self._order == "rgb" else np.ascontiguousarray(colours[:, ::-1])
            )
            self._names = names
        return self._colours


def _draw_names(
    seg: Segmentation, picture: npt.NDArray[np.uint8], before: list[NamePlace]
) -> list[NamePlace]:
    step = max(1, seg.labels.shape[1] // _LOOKED_AT)
    labels = np.ascontiguousarray(seg.labels[::step, ::step])
    coarse = replace(seg, labels=labels, scores=None, class_scores=None, frame=None)
    parts = coarse.components(min_area=max(1, round(labels.size * _SMALLEST_PART)))
    found = [(part.name, part.mask, (part.box[0], part.box[1])) for part in parts]
    return draw_names(picture, found, step=step, before=before)
