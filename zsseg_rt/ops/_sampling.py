"""What the NumPy references share: results to write, where bilinear samples are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ABSENT_LOGIT = np.float32(-1e20)  # a class that is not above this at a pixel is absent there

Taps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]


def out_or_new(
    out: npt.NDArray[Any] | None, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """The caller's array, or a new one."""
    return np.empty(shape, dtype) if out is None else out


def label_outputs(
    out: Any, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Labels and scores to write; scores that were not asked for are written and dropped."""
    labels, scores = out if isinstance(out, tuple) else (out, None)
    return out_or_new(labels, shape, dtype), out_or_new(scores, shape, np.float32)


def grid_taps(source: int, target: int, align: str = "half_pixel") -> Taps:
    """Lower and upper source index and the upper one's weight, for every target index.

    Edges clamped; positions are exact, weights rounded once, to float32.
    """
    if align == "corners":
        numerator, unit = np.arange(target) * (source - 1), max(target - 1, 1)
    else:
        numerator, unit = (2 * np.arange(target) + 1) * source - target, 2 * target
    lower, remainder = np.divmod(np.clip(numerator, 0, unit * (source - 1)), unit)
    weight = remainder.astype(np.float32) / np.float32(unit)
    return lower, np.minimum(lower + 1, source - 1), weight


def resize(
    planes: npt.NDArray[np.float32], size_hw: tuple[int, ...], rows: Any = slice(None)
) -> npt.NDArray[np.float32]:
    """Resize ``[..., h, w]``: ``(1 - t) * a + t * b`` down the rows, then along them.

    Shapes:
        planes: float32.

    Returns:
        float32 ``[..., len(rows), W]``.
    """
    top, bottom, down = (taps[rows] for taps in grid_taps(planes.shape[-2], size_hw[0]))
    left, right, across = grid_taps(planes.shape[-1], size_hw[1])
    down = down[:, None]
    edges = (1 - down) * planes[..., top, :] + down * planes[..., bottom, :]
    resized: npt.NDArray[np.float32] = (1 - across) * edges[..., left] + across * edges[..., right]
    return resized
