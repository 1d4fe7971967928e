"""yuv420: the law is ops.reference.yuv420, bit for bit; overlay's way back undoes it."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

MATRICES = {"bt601": 2, "bt709": 2, "bt601-full": 1, "bt709-full": 1}  # largest way back
LAYOUTS = ["nv12", "i420"]


def picture(height, width):
    """Every kind of colour, the corners of the cube too."""
    rng = np.random.default_rng(height)
    made = rng.integers(0, 256, (height, width, 3), np.uint8)
    made[rng.random((height, width)) < 0.3] &= 128
    return np.where(made == 128, np.uint8(255), made)


def shapes(height, width, layout):
    rows, columns = -(-height // 2), -(-width // 2)
    colours = [(rows, columns, 2)] if layout == "nv12" else [(rows, columns)] * 2
    return [(2 * rows, 2 * columns), *colours]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (13, 18), (31, 64), (34, 515)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_equals_reference(device, size, layout, matrix, order):
    image, wanted = picture(*size), shapes(*size, layout)
    settings = {"layout": layout, "colour_matrix": matrix, "channel_order": order}
    out = tuple(device.poisoned(shape, np.uint8) for shape in wanted)
    expected = reference.yuv420(image, **settings)
    placed = device.place(image)
    found = ops.yuv420(placed, **settings, out=out, stream=device.stream)
    new = ops.yuv420(placed, **settings, stream=device.stream)
    for plane, given, made, law in zip(found, out, new, expected, strict=True):
        assert plane is given
        assert device.holds(given)
        assert device.holds(made)
        np.testing.assert_array_equal(device.fetch(given), law)
        np.testing.assert_array_equal(device.fetch(made), law)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set_and_thread_count(layout):
    image = picture(481, 641)
    found, law = ops.yuv420(image, layout=layout), reference.yuv420(image, layout=layout)
    for plane, expected in zip(found, law, strict=True):
        np.testing.assert_array_equal(plane, expected)


class Pitched:
    """A plane of a surface: its rows lie further apart than they are long."""

    def __init__(self, surface, first, shape, pitch):
        strides = (pitch, *np.empty(shape, np.uint8).strides[1:])
        address = surface.__cuda_array_interface__["data"][0] + first
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "strides": strides, "typestr": "|u1",
            "version": 3,
        }  # fmt: skip


@pytest.mark.parametrize(("size", "pitch"), [((31, 64), 96), ((30, 46), 77)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_the_planes_may_lie_apart(device, size, pitch, layout):
    image = picture(*size)
    law = reference.yuv420(image, layout=layout)
    surface = device.place(np.full((3 * 32, pitch), 7, np.uint8))
    firsts = [0, 32 * pitch, 64 * pitch]
    if device.name == "cpu":
        planes = []
        for first, plane in zip(firsts, law, strict=False):
            rows = surface.reshape(-1)[first : first + len(plane) * pitch].reshape(-1, pitch)
            length = plane[0].size
            planes.append(
                np.lib.stride_tricks.as_strided(
                    rows[:, :length], plane.shape, (pitch, *plane.strides[1:])
                )
            )
    else:
        planes = [
            Pitched(surface, first, plane.shape, pitch)
            for first, plane in zip(firsts, law, strict=False)
        ]
    ops.yuv420(device.place(image), layout=layout, out=tuple(planes), stream=device.stream)
    expected = np.full((3 * 32, pitch), 7, np.uint8)
    for first, plane in zip(firsts, law, strict=False):
        begin = first // pitch
        expected[begin : begin + len(plane), : plane[0].size] = plane.reshape(len(plane), -1)
    np.testing.assert_array_equal(device.fetch(surface), expected)


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_way_back_of_plain_colours(matrix):
    side = np.append(np.arange(0, 256, 15), 254).astype(np.uint8)
    colours = np.stack(np.meshgrid(side, side, side), axis=-1).reshape(-1, side.size, 3)
    image = colours.repeat(2, axis=0).repeat(2, axis=1)
    planes = ops.yuv420(image, colour_matrix=matrix)
    nothing = (np.zeros(image.shape[:2], np.uint8), np.empty((0, 3), np.uint8))
    back = ops.overlay(planes, *nothing, colour_matrix=matrix).astype(int)
    assert np.abs(back - image).max() == MATRICES[matrix]
    grey = np.repeat(np.arange(256, dtype=np.uint8), 12).reshape(-1, 2, 3)
    assert (np.asarray(ops.yuv420(grey, colour_matrix=matrix)[1]) == 128).all()


def test_equals_opencv_where_two_by_two_pixels_are_of_one_colour():
    cv2 = pytest.importorskip("cv2")
    image = picture(40, 36).repeat(2, axis=0).repeat(2, axis=1)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420).reshape(-1)
    found = np.concatenate([plane.reshape(-1) for plane in ops.yuv420(image, layout="i420")])
    np.testing.assert_array_equal(found, expected)


GOOD = {"image": picture(4, 6)}
BAD = [
    ({"image": picture(4, 6)[..., :2].copy()}, ShapeError, "image"),
    ({"image": picture(4, 6)[:0]}, ShapeError, "image"),
    ({"image": picture(4, 6)[:, ::2]}, ShapeError, "image"),
    ({"image": np.zeros((4, 6, 3), np.float32)}, DTypeError, "image"),
    ({"layout": "yv12"}, ArgumentError, "layout"),
    ({"channel_order": "gbr"}, ArgumentError, "channel_order"),
    ({"colour_matrix": "bt2020"}, ArgumentError, "colour_matrix"),
    ({"out": (np.zeros((4, 6), np.uint8),)}, ArgumentError, "out"),
    ({"out": (np.zeros((4, 6), np.uint8), np.zeros((2, 3), np.uint8))}, ShapeError, "out[1]"),
    ({"out": (np.zeros((4, 6), np.int8), np.zeros((2, 3, 2), np.uint8))}, DTypeError, "out[0]"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.yuv420(**{**GOOD, **change})
