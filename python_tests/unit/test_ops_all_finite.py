"""all_finite: the law is ops.reference.all_finite."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.ops import reference


@pytest.mark.parametrize("shape", [(1,), (0, 3), (7, 11, 13), (1, 2, 3, 257), (300001,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [0.0, 6e4, 6e-8, np.nan, np.inf, -np.inf])
def test_equals_reference(device, shape, dtype, value):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    places = [0, values.size // 2, values.size - 1] if values.size else [None]
    for place in places:
        given = values.copy()
        if place is not None:
            given.flat[place] = value
        out = device.poisoned((1,), np.uint8)
        placed = device.place(given)
        assert ops.all_finite(placed, out=out, stream=device.stream) is out
        assert device.holds(out)
        expected = reference.all_finite(given)
        assert expected[0] == (place is None or np.isfinite(value))
        np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count():
    values = np.ones((3, 1 << 19), np.float32)
    assert ops.all_finite(values).tolist() == [1]
    for row in range(3):
        values[row, -1 - row] = np.nan
        assert ops.all_finite(values).tolist() == [0]
        values[row] = 1


BAD = [
    ({"values": np.zeros(3)}, DTypeError, "values"),
    ({"values": np.zeros((4, 4), np.float32).T[::2]}, ShapeError, "values"),
    ({"out": np.zeros(2, np.uint8)}, ShapeError, "out"),
    ({"out": np.zeros(1, bool)}, DTypeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    given = {"values": np.zeros(3, np.float32), **change}
    with refused(error, argument):
        ops.all_finite(**given)
