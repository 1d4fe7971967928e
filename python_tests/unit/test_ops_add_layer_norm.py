"""add_layer_norm: the law is ops.reference.add_layer_norm."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

EPS = [1e-5, 1e-6]
# Sums in another order, relative to numbers up to about 10; in half, one rounding may differ.
TOLERANCES = {np.float32: 3e-5, np.float16: 8e-3}


def random_arguments(rows, width, norms, dtype=np.float32):
    rng = np.random.default_rng((rows, width, norms))
    x, y = rng.standard_normal((2, rows, width), np.float32).astype(dtype)
    scale, shift = rng.standard_normal((2, norms, width), np.float32)
    return x, y, scale, shift


@pytest.mark.parametrize("size", [(0, 4), (1, 1), (3, 37), (65, 768), (5, 1030), (2, 2048)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("total_after", [None, 0, 1])
def test_equals_reference(device, size, dtype, norms, total_after):
    with_total = total_after is not None
    arguments = random_arguments(*size, norms, dtype)
    placed = [device.place(argument) for argument in arguments]
    total = device.poisoned(size, dtype) if with_total else None
    out = device.poisoned(size, dtype)
    settings = {"eps": EPS[:norms], "total_after": min(total_after or 0, norms - 1)}
    written = {"total": total, "out": out}
    assert ops.add_layer_norm(*placed, **settings, **written, stream=device.stream) is out
    assert device.holds(out)
    expected_total = np.empty(size, dtype)
    expected = reference.add_layer_norm(*arguments, **settings, total=expected_total)
    tolerance = TOLERANCES[dtype]
    if with_total:  # a sum is exact
        exact = {} if settings["total_after"] else {"rtol": 0, "atol": 0}
        near = {"rtol": tolerance, "atol": tolerance, **exact}
        np.testing.assert_allclose(device.fetch(total), expected_total, **near)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x_width", [1536, 771])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_only_the_first_columns_of_wider_rows_are_read(device, x_width, dtype):
    x, *others = random_arguments(5, 768, 1, dtype)
    behind = np.full((5, x_width - 768), np.nan, dtype)
    placed = [device.place(given) for given in (np.concatenate([x, behind], axis=1), *others)]
    out = device.poisoned(x.shape, dtype)
    ops.add_layer_norm(*placed, eps=[1e-5], out=out, stream=device.stream)
    assert device.holds(out)
    expected = reference.add_layer_norm(x, *others, eps=[1e-5])
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(device.fetch(out), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["native", "reference"])
def test_rows_have_mean_zero_and_variance_one(implementation):
    x, y, _, _ = random_arguments(7, 501, 1)
    ones = np.ones((1, 501), np.float32)
    normed = implementation.add_layer_norm(x * 50 + 1000, y, ones, 0 * ones, eps=[0.0])
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-4)
    np.testing.assert_allclose(normed.std(-1), 1, atol=1e-4)


X, Y, SCALE, SHIFT = random_arguments(3, 4, 1)
GOOD = {"x": X, "y": Y, "scale": SCALE, "shift": SHIFT, "eps": [1e-5]}
WIDE = np.zeros((1, 2049), np.float32)
BAD = [
    ({"x": X[0]}, ShapeError, "x"),
    ({"x": X.astype(np.float64)}, DTypeError, "x"),
    (dict.fromkeys(("x", "y", "scale", "shift"), WIDE), ShapeError, "y"),
    ({"x": X[:, :3].copy()}, ShapeError, "x"),
    ({"x": np.zeros((3, 8), np.float32)[:, :4]}, ShapeError, "x"),
    ({"y": Y[:2].copy()}, ShapeError, "y"),
    ({"y": Y.astype(np.float16)}, DTypeError, "y"),
    ({"scale": SCALE.astype(np.float16)}, DTypeError, "scale"),
    ({"scale": np.zeros((3, 4), np.float32)}, ShapeError, "scale"),
    ({"shift": np.zeros((2, 4), np.float32)}, ShapeError, "shift"),
    ({"eps": [1e-5, 1e-5]}, ArgumentError, "eps"),
    (
        {"scale": np.ones((2, 4), np.float32), "shift": np.ones((2, 4), np.float32), "eps": 0.1},
        ArgumentError,
        "eps",
    ),
    ({"eps": None}, DTypeError, "add_layer_norm"),
    ({"eps": [-1.0]}, ArgumentError, "eps"),
    ({"total_after": 1}, ArgumentError, "total_after"),
    ({"total_after": -1}, ArgumentError, "total_after"),
    ({"eps": [float("nan")]}, ArgumentError, "eps"),
    ({"total": X}, ArgumentError, "total"),
    ({"total": np.zeros((3, 5), np.float32)}, ShapeError, "total"),
    ({"out": Y}, ArgumentError, "out"),
    ({"out": X.astype(np.float16)}, DTypeError, "out"),
]


def test_one_norm_takes_its_number_alone():
    alone = ops.add_layer_norm(**{**GOOD, "eps": 0.1})
    np.testing.assert_array_equal(alone, ops.add_layer_norm(**{**GOOD, "eps": [0.1]}))


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.add_layer_norm(**{**GOOD, **change})
