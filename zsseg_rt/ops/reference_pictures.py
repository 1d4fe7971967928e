"""NumPy definitions of what is made of painted pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import out_or_new

# What is black; then what red, green and blue add to brightness, U and V, in multiples of 2^-20:
# ITU-R BT.601 as OpenCV has it, and BT.709.
RGB_TO_YUV = {
    "bt601": (
        16,
        [(269484, 528482, 102760), (-155188, -305135, 460324), (460324, -385875, -74448)],
    ),
    "bt709": (
        16,
        [(191455, 644068, 65019), (-105533, -355018, 460551), (460551, -418321, -42230)],
    ),
    "bt601-full": (
        0,
        [(313524, 615514, 119538), (-176932, -347356, 524288), (524288, -439026, -85262)],
    ),
    "bt709-full": (
        0,
        [(222927, 749942, 75707), (-120138, -404150, 524288), (524288, -476214, -48074)],
    ),
}


def yuv420(
    image: Array,
    *,
    layout: str = "nv12",
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    out: tuple[Array, ...] | None = None,
    stream: int = 0,
) -> tuple[npt.NDArray[Any], ...]:
    """Reference of :func:`zsseg_rt.ops.yuv420`."""
    rgb = (image[..., ::-1] if channel_order == "bgr" else image).astype(np.int64)
    rgb = np.pad(rgb, ((0, len(rgb) % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
    black, (of_luma, *of_chroma) = RGB_TO_YUV[colour_matrix]
    luma = (rgb @ np.array(of_luma) + (black << 20) + (1 << 19)) >> 20
    height, width = luma.shape
    sums = rgb.reshape(height // 2, 2, width // 2, 2, 3).sum(axis=(1, 3))
    chroma = (sums @ np.array(of_chroma).T + (128 << 22) + (1 << 21)) >> 22
    chroma = np.minimum(chroma, 255)
    planes = [luma, chroma] if layout == "nv12" else [luma, chroma[..., 0], chroma[..., 1]]
    results = [
        out_or_new(given, plane.shape, np.uint8)
        for given, plane in zip(out or [None] * len(planes), planes, strict=True)
    ]
    for result, plane in zip(results, planes, strict=True):
        result[...] = plane
    return tuple(results)


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
