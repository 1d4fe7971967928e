"""Frames turned as a phone was held, on their way to a GPU, and as video encoders take them."""

import struct

import numpy as np
import pytest

from support.streams import ReaderNow, write_video
from zsseg_rt.stream.conversion import i420, upright
from zsseg_rt.stream.uris import open_sources

pytest.importorskip("av")


ONE = 1 << 16
# What the phone did with the upright picture, and (a, b, c, d) of the matrix that undoes it.
HELD = {
    "upright": (lambda p: p, (ONE, 0, 0, ONE)),
    "90": (lambda p: np.rot90(p, 1), (0, ONE, -ONE, 0)),
    "180": (lambda p: np.rot90(p, 2), (-ONE, 0, 0, -ONE)),
    "270": (lambda p: np.rot90(p, 3), (0, -ONE, ONE, 0)),
    "mirrored": (lambda p: p[:, ::-1], (-ONE, 0, 0, ONE)),
    "upside down": (lambda p: p[::-1], (ONE, 0, 0, -ONE)),
    "mirrored, 90": (lambda p: p.transpose(1, 0, 2), (0, ONE, ONE, 0)),
    "mirrored, 270": (lambda p: p[::-1, ::-1].transpose(1, 0, 2), (0, -ONE, -ONE, 0)),
}


def scene():
    """64x48, each corner of another colour."""
    picture = np.zeros((48, 64, 3), np.uint8)
    colours = (200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)
    for place, colour in enumerate(colours):
        top, left = place // 2 * 24, place % 2 * 32
        picture[top : top + 24, left : left + 32] = colour
    return picture


def record(path, picture, matrix):
    """A video whose header notes how to show it, as phones write it."""
    write_video(path, [np.ascontiguousarray(picture)] * 3)
    data = bytearray(path.read_bytes())
    a, b, c, d = matrix
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("held", sorted(HELD))
def test_frames_are_upright_however_the_phone_was_held(tmp_path, held):
    order = "bgr" if "mirrored" in held else "rgb"
    lie, matrix = HELD[held]
    path = record(tmp_path / "phone.mp4", lie(scene()), matrix)
    (source,) = open_sources(path, order)
    found = [picture.image for picture in source.pictures(ReaderNow())]
    assert len(found) == 3
    expected = scene() if order == "rgb" else scene()[..., ::-1]
    for image in found:
        assert image.flags["C_CONTIGUOUS"]
        assert image.shape == expected.shape
        off = np.abs(image.astype(int) - expected)
        assert np.median(off) <= 6  # lossy coding: 1 without turning, 160 if turned wrongly
        assert off[::47, ::63].max() <= 12  # the corners


SLANTED = round(ONE * 0.7071)


@pytest.mark.parametrize(
    "matrix",
    [None, (0,) * 9, (ONE, *(0,) * 8), (SLANTED, SLANTED, 0, -SLANTED, SLANTED, 0, 0, 0, 1 << 30)],
)
def test_without_a_usable_note_or_at_other_angles_nothing_is_turned(matrix):
    image = scene()
    assert upright(image, matrix) is image


# ITU-R BT.601, limited range: rows Y, U, V from R, G, B in [0, 255].
MATRIX = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
OFFSET = np.array([16.0, 128.0, 128.0])


def expected_planes(rgb):
    """Y per pixel, U and V as the mean over each 2x2 pixels; float64."""
    yuv = rgb.astype(np.float64) / 255.0 @ MATRIX.T + OFFSET
    height, width = rgb.shape[:2]
    means = yuv.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    return yuv[..., 0], means[..., 1], means[..., 2]


def split(planes):
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    u, v = planes[height:].reshape(2, height // 2, width // 2)
    return planes[:height], u, v


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size_hw", [(2, 6), (6, 2), (50, 322), (720, 1280)])
def test_planes_are_those_of_the_standard(size_hw, channel_order):
    rgb = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    image = rgb if channel_order == "rgb" else np.ascontiguousarray(rgb[..., ::-1])
    planes = split(i420(image, channel_order))
    for found, expected in zip(planes, expected_planes(rgb), strict=True):
        # Rounded twice: the mean of four pixels, then 10-bit weights.
        assert np.abs(found - expected).max() <= 2.0
        assert np.abs(found - expected).mean() <= 0.5


@pytest.mark.parametrize("size_hw", [(1, 1), (47, 63), (48, 63), (47, 64)])
def test_odd_sides_repeat_their_last_row_or_column(size_hw):
    rgb = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    even = np.pad(rgb, ((0, size_hw[0] % 2), (0, size_hw[1] % 2), (0, 0)), mode="edge")
    np.testing.assert_array_equal(i420(rgb, "rgb"), i420(even, "rgb"))
