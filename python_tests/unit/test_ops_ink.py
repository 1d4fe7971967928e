"""ink: the law is ops.reference.ink, bit for bit."""

import numpy as np
import pytest

from conftest import require_cuda
from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

COLOURS = [(0, 10, 20), (255, 130, 200), (7, 255, 0), (128, 128, 128)]
PLACES = [(3, 4), (0, 0), (-5, -7), (28, 60), (-5, 60), (-11, 2), (31, 2), (3, 1 << 62)]


def arrays(colours=2, size=(31, 67), of_ink=(11, 23)):
    rng = np.random.default_rng(colours)
    weights = rng.integers(0, 256, (colours, *of_ink), np.uint8)
    weights[rng.random(weights.shape) < 0.4] = 0
    return rng.integers(0, 256, (*size, 3), np.uint8), weights


@pytest.mark.parametrize("colours", [1, 2, 4])
@pytest.mark.parametrize("place", PLACES)
def test_equals_reference(colours, place):
    picture, weights = arrays(colours)
    expected = reference.ink(picture.copy(), weights, place, COLOURS[:colours])
    assert (expected != picture).any() == (place in PLACES[:5])
    assert ops.ink(picture, weights, place, COLOURS[:colours]) is picture
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.usefixtures("cpu_isa")
def test_every_instruction_set_and_a_patch_larger_than_the_picture():
    picture, weights = arrays(2, (31, 67), (60, 90))
    expected = reference.ink(picture.copy(), weights, (-9, -11), COLOURS[:2])
    np.testing.assert_array_equal(ops.ink(picture, weights, (-9, -11), COLOURS[:2]), expected)


def test_nothing_to_lay_changes_nothing():
    picture, weights = arrays()
    before = picture.copy()
    ops.ink(picture, weights[:, :0].copy(), (2, 2), COLOURS[:2])
    ops.ink(picture, np.zeros_like(weights), (2, 2), COLOURS[:2])
    np.testing.assert_array_equal(picture, before)


def read_only():
    picture = arrays()[0]
    picture.flags.writeable = False
    return picture


PICTURE, WEIGHTS = arrays()
GOOD = {"picture": PICTURE, "weights": WEIGHTS, "place": (0, 0), "colours": COLOURS[:2]}
BAD = [
    ({"picture": PICTURE[..., :2].copy()}, ShapeError, "picture"),
    ({"picture": PICTURE[:0].copy()}, ShapeError, "picture"),
    ({"picture": PICTURE[:, ::2]}, ShapeError, "picture"),
    ({"picture": read_only()}, ShapeError, "picture"),
    ({"weights": WEIGHTS[0].copy()}, ShapeError, "weights"),
    ({"weights": WEIGHTS.astype(np.float32)}, DTypeError, "weights"),
    ({"colours": COLOURS[:1]}, ArgumentError, "colours"),
    ({"colours": []}, ArgumentError, "colours"),
    ({"colours": [*COLOURS, (0, 0, 0)]}, ArgumentError, "colours"),
    ({"colours": [(0, 0, 256), (0, 0, 0)]}, DTypeError, "ink"),
    ({"place": (0.5, 0)}, DTypeError, "ink"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.ink(**{**GOOD, **change})


@pytest.mark.needs_cuda
def test_names_are_written_on_the_cpu_alone():
    require_cuda()
    picture, weights = map(ops.DeviceArray.from_numpy, arrays())
    with refused(DeviceError, "picture"):
        ops.ink(picture, weights, (0, 0), COLOURS[:2])
