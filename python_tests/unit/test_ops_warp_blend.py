"""warp_blend: the law is ops.reference.warp_blend, bit for bit."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

SIZES = [(1, 1, 1, 1), (0, 2, 3, 4), (1, 3, 1, 9), (2, 9, 13, 1), (3, 17, 11, 37), (1, 171, 32, 32)]


def random_arguments(size, reach):
    """Flows of up to ``reach`` cells; weights below 0 and above 1 among them."""
    rng = np.random.default_rng(size)
    batch, _, height, width = size
    logits, past = rng.standard_normal((2, *size), np.float32)
    flow = rng.uniform(-reach, reach, (batch, height, width, 2)).astype(np.float32)
    weight = rng.uniform(-0.3, 1.3, (batch, height, width)).astype(np.float32)
    return logits, past, flow, weight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reach", [0.4, 5.0])
def test_equals_reference(device, size, reach):
    arguments = random_arguments(size, reach)
    out = device.poisoned(size, np.float32)
    placed = [device.place(argument) for argument in arguments]
    assert ops.warp_blend(*placed, out=out, stream=device.stream) is out
    assert device.holds(out)
    np.testing.assert_array_equal(device.fetch(out), reference.warp_blend(*arguments))


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count():
    arguments = random_arguments((2, 150, 24, 33), 2.0)
    result = ops.warp_blend(*arguments)
    np.testing.assert_array_equal(result, reference.warp_blend(*arguments))


@pytest.mark.parametrize("implementation", [ops, reference], ids=["native", "reference"])
def test_whole_cells_move_and_the_rest_is_new(implementation):
    logits, past, flow, weight = random_arguments((1, 4, 6, 7), 0.0)
    flow[...] = (2, -1)  # what is here was two columns to the right and a row above
    weight[...] = 1.0
    moved = implementation.warp_blend(logits, past, flow, weight)
    np.testing.assert_array_equal(moved[:, :, 1:, :5], past[:, :, :5, 2:])
    np.testing.assert_array_equal(moved[:, :, 0], logits[:, :, 0])
    np.testing.assert_array_equal(moved[:, :, :, 5:], logits[:, :, :, 5:])


@pytest.mark.parametrize("implementation", [ops, reference], ids=["native", "reference"])
def test_the_edge_is_clamped_for_half_a_cell_and_no_further(implementation):
    logits = np.zeros((1, 1, 1, 6), np.float32)
    past = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 1, 6)
    flow = np.zeros((1, 1, 6, 2), np.float32)
    flow[0, 0, :, 0] = [-0.5, -1.5, -2.51, 2.5, 1.51, np.nan]
    flow[0, 0, 2, 1] = 0.5
    weight = np.ones((1, 1, 6), np.float32)
    moved = implementation.warp_blend(logits, past, flow, weight)
    np.testing.assert_array_equal(moved[0, 0, 0], [1, 1, 0, 6, 0, 0])


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan])
def test_what_does_not_count_is_not_read(device, weight):
    logits, _, flow, weights = random_arguments((1, 3, 4, 5), 0.3)
    past = np.full_like(logits, np.nan)
    arguments = (logits, past, flow, np.full_like(weights, weight))
    placed = [device.place(argument) for argument in arguments]
    result = ops.warp_blend(*placed, stream=device.stream)
    assert device.holds(result)
    np.testing.assert_array_equal(device.fetch(result), logits)


def test_out_may_be_the_logits(device):
    arguments = random_arguments((2, 5, 9, 8), 1.0)
    placed = [device.place(argument) for argument in arguments]
    assert ops.warp_blend(*placed, out=placed[0], stream=device.stream) is placed[0]
    np.testing.assert_array_equal(device.fetch(placed[0]), reference.warp_blend(*arguments))


LOGITS, PAST, FLOW, WEIGHT = random_arguments((1, 3, 4, 5), 1.0)
GOOD = {"logits": LOGITS, "past": PAST, "flow": FLOW, "past_weight": WEIGHT}
BAD = [
    ({"logits": LOGITS[0]}, ShapeError, "logits"),
    ({"logits": LOGITS.astype(np.float16)}, DTypeError, "logits"),
    ({"logits": LOGITS[:, :0].copy()}, ShapeError, "logits"),
    ({"logits": LOGITS[:, :, :0].copy()}, ShapeError, "logits"),
    ({"past": PAST[:, :2].copy()}, ShapeError, "past"),
    ({"past": PAST.astype(np.float64)}, DTypeError, "past"),
    ({"flow": FLOW[..., 0].copy()}, ShapeError, "flow"),
    ({"flow": FLOW.astype(np.int32)}, DTypeError, "flow"),
    ({"past_weight": FLOW}, ShapeError, "past_weight"),
    ({"past_weight": WEIGHT > 0}, DTypeError, "past_weight"),
    ({"out": PAST}, ArgumentError, "out"),
    ({"out": np.zeros((1, 3, 5, 4), np.float32)}, ShapeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.warp_blend(**{**GOOD, **change})
