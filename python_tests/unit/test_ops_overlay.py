"""overlay: the law is ops.reference.overlay, bit for bit."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference


def random_arguments(height, width, colours, dtype):
    rng = np.random.default_rng(height)
    unknown = np.iinfo(dtype).max
    values = np.array([*range(colours + 2), unknown], dtype)  # two labels have no colour
    return (
        rng.integers(0, 256, (height, width, 3), np.uint8),
        rng.choice(values, (height, width)),
        rng.integers(0, 256, (colours, 3), np.uint8),
    )


@pytest.mark.parametrize("size", [(0, 5), (1, 1), (13, 17), (61, 257)])
@pytest.mark.parametrize("colours", [0, 1, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equals_reference(device, size, colours, dtype, alpha):
    arguments = random_arguments(*size, colours, dtype)
    out = device.poisoned((*size, 3), np.uint8)
    placed = [device.place(argument) for argument in arguments]
    result = ops.overlay(*placed, alpha=alpha, out=out, stream=device.stream)
    assert result is out
    assert device.holds(out)
    expected = reference.overlay(*arguments, alpha=alpha)
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_instruction_set_and_thread_count(dtype):
    arguments = random_arguments(480, 641, 20, dtype)
    np.testing.assert_array_equal(ops.overlay(*arguments), reference.overlay(*arguments))


def test_unknown_stays_the_frame_s_even_with_a_full_palette(device):
    frame, _, _ = random_arguments(3, 4, 1, np.uint8)
    labels = np.full((3, 4), 255, np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    placed = [device.place(argument) for argument in (frame, labels, palette)]
    out = ops.overlay(*placed, stream=device.stream)
    assert device.holds(out)
    np.testing.assert_array_equal(device.fetch(out), frame)


def test_out_may_be_the_frame():
    frame, labels, palette = random_arguments(31, 37, 5, np.uint8)
    expected = reference.overlay(frame, labels, palette)
    assert ops.overlay(frame, labels, palette, out=frame) is frame
    np.testing.assert_array_equal(frame, expected)


def random_planes(height, width):
    """Every brightness beside every colour, out of the limited range too."""
    rng = np.random.default_rng(width)
    luma = rng.integers(0, 256, (height, width), np.uint8)
    return luma, rng.integers(0, 256, (height // 2, width // 2, 2), np.uint8)


@pytest.mark.parametrize("size", [(2, 2), (14, 18), (34, 516)])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt601-full", "bt709-full"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_planes_equal_reference(device, size, matrix, order, dtype):
    planes, (_, labels, palette) = random_planes(*size), random_arguments(*size, 5, dtype)
    settings = {"alpha": 0.3, "channel_order": order, "colour_matrix": matrix}
    out = device.poisoned((*size, 3), np.uint8)
    placed = tuple(device.place(plane) for plane in planes)
    drawn = (device.place(labels), device.place(palette))
    assert ops.overlay(placed, *drawn, **settings, out=out, stream=device.stream) is out
    assert device.holds(out)
    expected = reference.overlay(planes, labels, palette, **settings)
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_planes_on_every_instruction_set_with_rows_apart():
    luma, chroma = random_planes(480, 642)
    _, labels, palette = random_arguments(480, 642, 20, np.uint8)
    wide = np.zeros((480, 700), np.uint8)
    wide[:, :642] = luma
    expected = reference.overlay((luma, chroma), labels, palette)
    np.testing.assert_array_equal(ops.overlay((wide[:, :642], chroma), labels, palette), expected)


FRAME, LABELS, PALETTE = random_arguments(4, 5, 3, np.uint8)
GOOD = {"frame": FRAME, "labels": LABELS, "palette": PALETTE}
BAD = [
    ({"frame": FRAME[0]}, ShapeError, "frame"),
    ({"labels": LABELS[:3]}, ShapeError, "labels"),
    ({"labels": LABELS.astype(np.int64)}, DTypeError, "labels"),
    ({"palette": PALETTE[:, :2].copy()}, ShapeError, "palette"),
    ({"alpha": 1.5}, ArgumentError, "alpha"),
    ({"alpha": float("nan")}, ArgumentError, "alpha"),
    ({"out": np.zeros((5, 4, 3), np.uint8)}, ShapeError, "out"),
    ({"channel_order": "gbr"}, ArgumentError, "channel_order"),
    ({"colour_matrix": "bt2020"}, ArgumentError, "colour_matrix"),
    ({"frame": random_planes(4, 6)}, ShapeError, "labels"),
    ({"frame": (random_planes(4, 6)[0], LABELS)}, ShapeError, "frame[1]"),
    ({"frame": (FRAME[..., 0].copy(), FRAME)}, ShapeError, "frame[0]"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.overlay(**{**GOOD, **change})
