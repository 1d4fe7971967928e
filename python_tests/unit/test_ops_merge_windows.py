"""merge_windows, and the parts of resized frames: the law is ops.reference."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def random_floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("classes", [1, 9, 300])
@pytest.mark.parametrize(
    ("window", "grid", "places"),
    [
        ((1, 1), (1, 1), [(0, 0)]),
        ((4, 5), (7, 9), [(0, 0), (3, 4), (0, 4)]),
        ((6, 6), (5, 4), [(0, 0)]),  # a letterbox
        ((3, 17), (9, 33), [(8, 30), (9, 0)]),  # beyond the grid, partly and wholly
    ],
)
def test_matches_the_reference_in_every_bit(device, classes, window, grid, places):
    logits = random_floats(len(places), classes, *window)
    shares = np.abs(random_floats(*grid))
    arrays = [device.place(logits), device.place(shares)]
    out = ops.merge_windows(*arrays, places, stream=device.stream)
    expected = reference.merge_windows(logits, shares, places)
    np.testing.assert_array_equal(device.fetch(out), expected)
    again = ops.merge_windows(*arrays, places, add=True, out=out, stream=device.stream)
    assert again is out
    reference.merge_windows(logits, shares, places, add=True, out=expected)
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count():
    logits, shares = random_floats(2, 70, 28, 28), random_floats(40, 50)
    places = [(0, 0), (12, 22)]
    expected = reference.merge_windows(logits, shares, places)
    np.testing.assert_array_equal(ops.merge_windows(logits, shares, places), expected)


@pytest.mark.parametrize("align", ["half_pixel", "corners"])
@pytest.mark.parametrize("origin", [(0, 0), (13, 5), (40, 52)])  # the last reaches beyond
def test_parts_are_cut_out_of_the_resized_frame(device, align, origin):
    frame = np.random.default_rng(1).integers(0, 256, (31, 70, 3), np.uint8)
    settings = {"size_hw": (16, 24), "whole_hw": (45, 60), "align": align, **PLAIN}
    part = ops.preprocess(device.place(frame), **settings, origin=origin, stream=device.stream)
    np.testing.assert_allclose(
        device.fetch(part), reference.preprocess(frame, **settings, origin=origin), atol=1e-6
    )
    whole = ops.preprocess(frame, **(settings | {"size_hw": (45, 60), "whole_hw": None}))
    same = whole[:, origin[0] : origin[0] + 16, origin[1] : origin[1] + 24]
    _, rows, columns = same.shape
    np.testing.assert_allclose(device.fetch(part)[:, :rows, :columns], same, atol=1e-6)


LOGITS, SHARES = np.zeros((2, 3, 2, 2), np.float32), np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"logits": LOGITS.astype(np.float16)}, DTypeError, "logits"),
        ({"logits": LOGITS[0]}, ShapeError, "logits"),
        ({"shares": np.zeros(8, np.float32)}, ShapeError, "shares"),
        ({"shares": np.zeros((0, 4), np.float32)}, ShapeError, "shares"),
        ({"places": [(0, 0)]}, ArgumentError, "places"),
        ({"places": [(0, 0), (-1, 2)]}, ArgumentError, "places"),
        ({"places": [(0, 0)] * 17}, ArgumentError, "places"),
        ({"add": True}, ArgumentError, "out"),
        ({"out": np.zeros((1, 3, 2, 3), np.float32)}, ShapeError, "out"),
    ],
)
def test_errors_name_the_argument(changes, error, argument):
    given = {"logits": LOGITS, "shares": SHARES, "places": [(0, 0), (0, 2)], **changes}
    with refused(error, argument):
        ops.merge_windows(given.pop("logits"), given.pop("shares"), given.pop("places"), **given)


def test_parts_outside_are_refused():
    frame = np.zeros((4, 4, 3), np.uint8)
    with refused(ArgumentError, "origin"):
        ops.preprocess(frame, size_hw=(2, 2), whole_hw=(4, 4), origin=(4, 0), **PLAIN)
    with refused(ShapeError, "whole_hw"):
        ops.preprocess(frame, size_hw=(2, 2), whole_hw=(4, 40_000), **PLAIN)
