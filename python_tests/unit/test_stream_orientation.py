"""Videos of phones: how the phone was held is noted in the file, and the frames are turned."""

import struct

import numpy as np
import pytest

from support.streams import ReaderNow, write_video
from zsseg_rt.stream.conversion import upright
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


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("held", sorted(HELD))
def test_frames_are_upright_however_the_phone_was_held(tmp_path, held, order):
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


@pytest.mark.parametrize("matrix", [None, (0,) * 9, (ONE, 0, 0, 0, 0, 0, 0, 0, 0)])
def test_without_a_usable_note_nothing_is_turned(matrix):
    image = scene()
    assert upright(image, matrix) is image


def test_other_angles_are_left_alone():
    part = round(ONE * 0.7071)
    image = scene()
    assert upright(image, (part, part, 0, -part, part, 0, 0, 0, 1 << 30)) is image


def test_a_shape_of_one_pixel_is_turned_too():
    image = np.full((1, 5, 3), 7, np.uint8)
    image[0, 0] = 9
    turned = upright(image, (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30))
    assert turned.shape == (5, 1, 3)
    assert turned[0, 0, 0] == 9
