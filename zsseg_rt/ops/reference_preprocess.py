"""The part of :mod:`zsseg_rt.ops.reference` that makes a network's input of a camera's frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import out_or_new

# What is black; then from brightness above it and colour, less 128, to RGB, in multiples of 2^-20:
# brightness; V in red; U and V in green; U in blue. ITU-R BT.601 as OpenCV has it, and BT.709.
YUV_TO_RGB = {
    "bt601": (16, 1220542, 1673527, -409993, -852492, 2116026),
    "bt709": (16, 1220945, 1879825, -223607, -558796, 2215014),
    "bt601-full": (0, 1048576, 1470104, -360853, -748826, 1858077),
    "bt709-full": (0, 1048576, 1651297, -196424, -490864, 1945738),
}


def preprocess(
    frame: Array | tuple[Array, Array],
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    align: str = "half_pixel",
    whole_hw: tuple[int, int] | None = None,
    origin: tuple[int, int] = (0, 0),
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.preprocess`."""
    if isinstance(frame, tuple):
        rgb = rgb_of_nv12(frame[0], frame[1], colour_matrix)
    else:
        rgb = frame[:, :, ::-1] if channel_order == "bgr" else frame
    result = out_or_new(out, (3, *size_hw), np.float32)

    whole, parts = whole_hw or size_hw, list(zip(origin, size_hw, strict=True))
    top, bottom, down = _bilinear_taps(rgb.shape[0], whole[0], parts[0], align)
    left, right, across = _bilinear_taps(rgb.shape[1], whole[1], parts[1], align)
    across, down = across[:, None], down[:, None, None]
    above = (1 - across) * rgb[top][:, left] + across * rgb[top][:, right]
    below = (1 - across) * rgb[bottom][:, left] + across * rgb[bottom][:, right]
    resized = (1 - down) * above + down * below
    normalised = (resized / 255 - np.asarray(mean)) / np.asarray(std)
    result[...] = normalised.transpose(2, 0, 1)
    return result


def rgb_of_nv12(
    luma: npt.NDArray[Any], chroma: npt.NDArray[Any], colour_matrix: str
) -> npt.NDArray[np.uint8]:
    """RGB of two planes: every pixel takes the colour of its two by two."""
    black, brightness, v_red, u_green, v_green, u_blue = YUV_TO_RGB[colour_matrix]
    grey = brightness * np.maximum(luma.astype(np.int64) - black, 0)
    u, v = (chroma.astype(np.int64) - 128).repeat(2, axis=0).repeat(2, axis=1).transpose(2, 0, 1)
    scaled = np.stack([grey + v_red * v, grey + u_green * u + v_green * v, grey + u_blue * u], -1)
    rgb: npt.NDArray[np.uint8] = np.clip((scaled + (1 << 19)) >> 20, 0, 255).astype(np.uint8)
    return rgb


def _bilinear_taps(
    source: int, target: int, part: tuple[int, int], align: str
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Lower and upper source index and the upper one's weight, for a part of the target."""
    index = part[0] + np.arange(part[1])
    if align == "corners":
        position = index * (source - 1) / max(target - 1, 1)
    else:
        position = (index + 0.5) * source / target - 0.5
    position = np.clip(position, 0, source - 1)  # beyond the target, the edge
    lower = np.floor(position).astype(np.intp)
    return lower, np.minimum(lower + 1, source - 1), position - lower
