"""The part of :mod:`zsseg_rt.ops.reference` that makes a network's input of a camera's frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.errors import ShapeError
from zsseg_rt.ops._contract import (
    ANY,
    expect_array,
    expect_dtype,
    expect_out,
    expect_rows,
    expect_shape,
    expect_side_range,
    fail_argument,
    three_numbers,
)
from zsseg_rt.ops._overlap import expect_apart

__all__ = ["preprocess"]

# From brightness, less 16, and colour, less 128, to RGB, in multiples of 2^-20: brightness; V in
# red; U and V in green; U in blue. ITU-R BT.601 as OpenCV has it, and BT.709; limited range.
_YUV_TO_RGB = {
    "bt601": (1220542, 1673527, -409993, -852492, 2116026),
    "bt709": (1220945, 1879825, -223607, -558796, 2215014),
}


def preprocess(
    frame: Array | tuple[Array, Array],
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[Any]:
    """Reference of :func:`zsseg_rt.ops.preprocess`."""
    planes = _arrays_of(frame)
    three_numbers("mean", mean, "3 finite numbers", above=-math.inf)
    three_numbers("std", std, "3 finite numbers above 0", above=0.0)
    if channel_order not in ("rgb", "bgr"):
        fail_argument("channel_order", "'rgb' or 'bgr'", f"'{channel_order}'")
    if colour_matrix not in _YUV_TO_RGB:
        fail_argument("colour_matrix", "'bt601' or 'bt709'", f"'{colour_matrix}'")
    if len(planes) == 2:
        rgb = _rgb_of_nv12(*planes, channel_order, colour_matrix)
    else:
        rgb = _checked_rgb(planes[0], channel_order)
    expect_side_range("size_hw", size_hw, size_hw, "Pass (height, width).")
    names = ("frame",) if len(planes) == 1 else ("frame[0]", "frame[1]")
    expect_apart({"out": out}, dict(zip(names, planes, strict=True)))
    given = None if out is None else expect_array("out", out)
    if given is not None:
        expect_dtype("out", given, "float32", "float16", "bfloat16")
    result = expect_out("out", given, (3, *size_hw), np.float32 if given is None else given.dtype)

    top, bottom, down = _bilinear_taps(rgb.shape[0], size_hw[0])
    left, right, across = _bilinear_taps(rgb.shape[1], size_hw[1])
    across, down = across[:, None], down[:, None, None]
    above = (1 - across) * rgb[top][:, left] + across * rgb[top][:, right]
    below = (1 - across) * rgb[bottom][:, left] + across * rgb[bottom][:, right]
    resized = (1 - down) * above + down * below
    normalised = (resized / 255 - np.asarray(mean)) / np.asarray(std)
    result[...] = normalised.transpose(2, 0, 1)
    return result


def _arrays_of(frame: Any) -> tuple[npt.NDArray[Any], ...]:
    if not isinstance(frame, tuple):
        return (expect_array("frame", frame),)
    if len(frame) != 2:
        fail_argument("frame", "an array or two planes", f"{len(frame)} planes")
    return expect_rows("frame[0]", frame[0]), expect_rows("frame[1]", frame[1])


def _checked_rgb(frame: npt.NDArray[Any], channel_order: str) -> npt.NDArray[np.uint8]:
    expect_array("frame", frame, "uint8")
    expect_shape("frame", frame, (ANY, ANY, 3))
    expect_side_range("frame", frame.shape[:2], frame.shape, "Check that the frame was read.")
    return frame[:, :, ::-1] if channel_order == "bgr" else frame


def _rgb_of_nv12(
    luma: npt.NDArray[Any], chroma: npt.NDArray[Any], channel_order: str, colour_matrix: str
) -> npt.NDArray[np.uint8]:
    """Every pixel takes the colour of its two by two."""
    expect_dtype("frame[0]", luma, "uint8")
    expect_shape("frame[0]", luma, (ANY, ANY))
    expect_dtype("frame[1]", chroma, "uint8")
    height, width = luma.shape
    expect_side_range("frame", (height, width), luma.shape, "Check that the frame was read.")
    if height % 2 or width % 2:
        raise ShapeError(
            f"frame[0]: expected even sides, got {luma.shape}. NV12 has one colour for two by two "
            "pixels."
        )
    expect_shape("frame[1]", chroma, (height // 2, width // 2, 2))
    if channel_order == "bgr":
        fail_argument("channel_order", "'rgb' for a frame in two planes", "'bgr'")
    brightness, v_red, u_green, v_green, u_blue = _YUV_TO_RGB[colour_matrix]
    grey = brightness * np.maximum(luma.astype(np.int64) - 16, 0)
    u, v = (chroma.astype(np.int64) - 128).repeat(2, axis=0).repeat(2, axis=1).transpose(2, 0, 1)
    scaled = np.stack([grey + v_red * v, grey + u_green * u + v_green * v, grey + u_blue * u], -1)
    rgb: npt.NDArray[np.uint8] = np.clip((scaled + (1 << 19)) >> 20, 0, 255).astype(np.uint8)
    return rgb


def _bilinear_taps(
    source: int, target: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Lower and upper source index and the upper one's weight, for every target index."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    lower = np.floor(position).astype(np.intp)
    return lower, np.minimum(lower + 1, source - 1), position - lower
