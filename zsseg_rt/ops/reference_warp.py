"""References of the operations that carry logits from frame to frame, and from windows to one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import out_or_new


def warp_blend(
    logits: Array,
    past: Array,
    flow: Array,
    past_weight: Array,
    *,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.warp_blend`."""
    height, width = logits.shape[2:]
    result = out_or_new(out, logits.shape, np.float32)
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    weight = np.where(inside & (past_weight > 0), np.minimum(past_weight, np.float32(1)), 0)
    moved = _sample(past, np.where(inside, x, 0), np.where(inside, y, 0))
    weight = weight.astype(np.float32)[:, None]
    blended = (1 - weight) * logits + weight * moved
    result[...] = np.where(weight > 0, blended, logits)
    return result


def merge_windows(
    logits: Array,
    shares: Array,
    places: Sequence[tuple[int, int]],
    *,
    add: bool = False,
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.merge_windows`."""
    result = out_or_new(out, (1, logits.shape[1], *shares.shape), np.float32)
    if not add:
        result[...] = 0
    for window, (top, left) in zip(logits, places, strict=True):
        part = (..., slice(top, top + window.shape[1]), slice(left, left + window.shape[2]))
        target = result[part]
        target += shares[part] * window[:, : target.shape[2], : target.shape[3]]
    return result


def _sample(
    planes: npt.NDArray[np.float32], x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Planes ``[B, C, h, w]`` at positions ``[B, h, w]``: down the rows, then along them."""
    last_y, last_x = planes.shape[2] - 1, planes.shape[3] - 1
    x, y = np.clip(x, 0, last_x), np.clip(y, 0, last_y)
    left, top = x.astype(np.int64), y.astype(np.int64)
    right, bottom = np.minimum(left + 1, last_x), np.minimum(top + 1, last_y)
    across = (x - left.astype(np.float32))[:, None]
    down = (y - top.astype(np.float32))[:, None]

    def at(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        images = np.arange(len(planes))[:, None, None]
        return planes.transpose(0, 2, 3, 1)[images, row, column].transpose(0, 3, 1, 2)

    edge = (1 - down) * at(top, left) + down * at(bottom, left)
    other = (1 - down) * at(top, right) + down * at(bottom, right)
    moved: npt.NDArray[np.float32] = (1 - across) * edge + across * other
    return moved
