"""NumPy definition of what is written on painted pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def ink(
    picture: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    place: tuple[int, int],
    colours: Sequence[Sequence[int]],
    *,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.ink`."""
    rows, columns = (
        slice(max(first, 0), max(min(first + of_ink, side), 0))
        for first, of_ink, side in zip(place, weights.shape[1:], picture.shape, strict=False)
    )
    cut = weights[
        :,
        rows.start - place[0] : max(rows.stop - place[0], 0),
        columns.start - place[1] : max(columns.stop - place[1], 0),
    ]
    for layer, colour in zip(cut.astype(np.uint32)[..., None], colours, strict=True):
        window = picture[rows, columns]
        window[...] = (window * (255 - layer) + np.array(colour, np.uint32) * layer + 127) // 255
    return picture
