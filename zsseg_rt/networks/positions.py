"""Resize a table of positions to another grid, as torch's ``interpolate`` does."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from zsseg_rt.onnx.operations import Array


def resize_grid(
    grid: Array,
    size_hw: tuple[int, int],
    mode: str = "bicubic",
    *,
    antialias: bool = False,
    beyond: float = 0.0,
) -> Array:
    """Resize along the first two axes, half-pixel centres, edges repeated.

    ``beyond`` 0.1 is torch's ``scale_factor=(size + 0.1) / g``, as SCLIP's code resizes.

    Shapes:
        grid: float32 [g, g, W].

    Returns:
        float32 [*size_hw, W]; what torch's ``interpolate(..., align_corners=False)`` gives, up to
        rounding, for ``"bilinear"`` and ``"bicubic"``, with and without ``antialias``.
    """
    table = grid.detach().cpu().float() if hasattr(grid, "detach") else grid  # torch's
    resized = np.asarray(table, np.float64)
    for axis, size in enumerate(size_hw):
        rows = _weights(grid.shape[axis], size, mode, antialias, beyond)
        resized = np.moveaxis(np.tensordot(rows, resized, (1, axis)), 0, axis)
    return resized.astype(np.float32)


def _weights(old_size: int, size: int, mode: str, antialias: bool, beyond: float) -> Array:
    """How much each old place counts in each new one, [size, old_size]."""
    # torch's cubic has a = -0.75, with antialiasing a = -0.5.
    reach, kernel = (
        (1, _linear) if mode == "bilinear" else (2, _cubic(-0.5 if antialias else -0.75))
    )
    step = old_size / (size + beyond)
    stretch = max(step, 1.0) if antialias else 1.0
    matrix = np.zeros((size, old_size))
    for row in range(size):
        centre = (row + 0.5) * step - 0.5
        first = math.floor(centre - reach * stretch) + 1
        places = np.arange(first, math.ceil(centre + reach * stretch) + (0 if antialias else 1))
        weights = kernel((places - centre) / stretch)
        if antialias:  # places beyond the edge are left out, the others share their weight
            inside = (places >= 0) & (places < old_size)
            places, weights = places[inside], weights[inside] / weights[inside].sum()
        np.add.at(matrix[row], np.clip(places, 0, old_size - 1), weights)
    return matrix


def _linear(x: Array) -> Array:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(a: float) -> Callable[[Array], Array]:
    def weight(x: Array) -> Array:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return weight
