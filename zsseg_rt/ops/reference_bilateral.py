"""Reference of the operation that takes logits to a finer grid along a picture's edges."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import grid_taps, out_or_new

Floats = npt.NDArray[np.float32]

LEAST_LIKENESS = np.float32(1e-3)


def bilateral_upsample(
    logits: Array,
    guide: Array,
    *,
    scale: int = 5,
    reach: float = 0.2,
    align: str = "half_pixel",
    out: Array | None = None,
    stream: int = 0,
) -> Floats:
    """Reference of :func:`zsseg_rt.ops.bilateral_upsample`."""
    grid_hw, size_hw = logits.shape[2:], guide.shape[2:]
    top, bottom, down = grid_taps(grid_hw[0], size_hw[0], align)
    left, right, across = grid_taps(grid_hw[1], size_hw[1], align)
    down = down[:, None]
    sums = _cell_sums(_cell_sums(guide, grid_hw[0], scale, align), grid_hw[1], scale, align)
    counts = [_cell_counts(n, m, scale, align) for n, m in zip(grid_hw, size_hw, strict=True)]
    sizes = (counts[0][:, None] * counts[1]).astype(np.float32)
    colours: Floats = np.divide(sums, sizes, dtype=np.float32)
    inverse = np.float32(1) / (np.float32(reach) * np.float32(reach))
    one = np.float32(1)
    corners = (
        (top, left, (one - down) * (one - across)),
        (top, right, (one - down) * across),
        (bottom, left, down * (one - across)),
        (bottom, right, down * across),
    )
    weights = [
        share * _likeness(guide - colours[:, :, y[:, None], x], inverse) for y, x, share in corners
    ]
    whole = one / (((weights[0] + weights[1]) + weights[2]) + weights[3])
    terms = [
        (weight * whole)[:, None] * logits[:, :, y[:, None], x]
        for weight, (y, x, _) in zip(weights, corners, strict=True)
    ]
    result = out_or_new(out, (*logits.shape[:2], *size_hw), np.float32)
    result[...] = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    return result


def _likeness(difference: Floats, inverse: np.float32) -> Floats:
    """Of colours ``[B, 3, H, W]`` apart, ``[B, H, W]``."""
    red, green, blue = (difference[:, channel] for channel in range(3))
    left = np.float32(1) - ((red * red + green * green) + blue * blue) * inverse
    kept = np.where(left > 0, left, np.float32(0))
    square = kept * kept
    alike: Floats = np.maximum(square * square, LEAST_LIKENESS)
    return alike


def _points(cell: int, size: int, scale: int, align: str) -> range:
    """The points of the finer grid that belong to a cell of an axis."""
    begin = cell * scale - (scale // 2 if align == "corners" else 0)
    return range(max(begin, 0), min(begin + scale, size))


def _cell_counts(cells: int, size: int, scale: int, align: str) -> npt.NDArray[np.int64]:
    return np.array([len(_points(cell, size, scale, align)) for cell in range(cells)])


def _cell_sums(planes: Floats, cells: int, scale: int, align: str) -> Floats:
    """Sums ``[B, 3, W, cells]`` over the points of each cell of axis 2 of ``[B, 3, H, W]``."""
    sums = np.zeros((*planes.shape[:2], planes.shape[3], cells), np.float32)
    for cell in range(cells):
        for point in _points(cell, planes.shape[2], scale, align):
            sums[..., cell] += planes[:, :, point]
    return sums
