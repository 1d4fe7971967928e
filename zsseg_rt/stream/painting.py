"""Labels laid over frames, for the sinks that show them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream.writers import frame_of


class Painter:
    """Lays each label's colour over its frame.

    Shapes:
        alpha: Weight of the colours, in [0, 1].
    """

    def __init__(self, *, channel_order: str, alpha: float) -> None:
        self._order, self._alpha = channel_order, alpha
        self._names: tuple[str, ...] = ()
        self._colours = palette(())

    def paint(self, seg: Segmentation, out: npt.NDArray[np.uint8]) -> None:
        """Paint a result's overlay.

        Shapes:
            out: uint8 [H, W, 3], of the frame's size.
        """
        colours = self._palette(seg.names)
        ops.overlay(frame_of(seg).image, seg.labels, colours, alpha=self._alpha, out=out)

    def _palette(self, names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
        if self._names != names:
            colours = palette(names)
            self._colours = (
                colours if self._order == "rgb" else np.ascontiguousarray(colours[:, ::-1])
            )
            self._names = names
        return self._colours
