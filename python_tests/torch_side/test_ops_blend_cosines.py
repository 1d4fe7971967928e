"""blend_cosines: the law is ops.reference.blend_cosines; torch and the kernels agree with it."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

SIZES = [(1, 1, 1, 1), (0, 2, 3, 4), (1, 3, 1, 9), (2, 9, 13, 1), (3, 17, 11, 37), (1, 171, 32, 32)]
ACTIVATIONS = ["sigmoid", "softmax"]


def random_arguments(size):
    """Logits of confident and of doubtful masks; weights 0 and 1 among the weights."""
    rng = np.random.default_rng(size)
    logits = (6.0 * rng.standard_normal(size)).astype(np.float32)
    cosines = rng.uniform(-20.0, 20.0, size).astype(np.float32)
    weights = rng.choice(np.float32([0.0, 0.2, 0.5, 1.0]), size[1])
    shares = rng.choice(np.float32([1.0, 0.5, 0.25]), size[1])
    return logits, cosines, weights, shares


def expect_equal(found, expected):
    """Log-odds of probabilities near 1 hang on their last digits; those probabilities do not."""
    shares = [1.0 / (1.0 + np.exp(-odds.astype(np.float64))) for odds in (found, expected)]
    np.testing.assert_allclose(*shares, atol=1e-5)
    doubtful = expected < 4.0
    np.testing.assert_allclose(found[doubtful], expected[doubtful], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference(device, size, activation):
    arguments = random_arguments(size)
    out = device.poisoned(size, np.float32)
    placed = [device.place(argument) for argument in arguments]
    result = ops.blend_cosines(*placed, activation=activation, out=out, stream=device.stream)
    assert result is out
    assert device.holds(out)
    expected = reference.blend_cosines(*arguments, activation=activation)
    expect_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_instruction_set_and_thread_count(activation):
    arguments = random_arguments((2, 150, 24, 33))
    result = ops.blend_cosines(*arguments, activation=activation)
    expected = reference.blend_cosines(*arguments, activation=activation)
    expect_equal(result, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_agrees(activation):
    torch = pytest.importorskip("torch")
    from zsseg_rt.models import functional

    arguments = random_arguments((2, 9, 5, 7))
    tensors = [torch.from_numpy(argument) for argument in arguments]
    result = functional.blend_cosines(*tensors, activation=activation).numpy()
    expected = reference.blend_cosines(*arguments, activation=activation)
    expect_equal(result, expected)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["native", "reference"])
class TestLaw:
    def test_weight_0_is_the_mask_and_weight_1_the_cosine(self, implementation):
        logits, cosines, weights, shares = random_arguments((1, 5, 4, 4))
        weights[:], shares[:] = 0.0, 1.0
        odds = implementation.blend_cosines(logits, cosines, weights, shares)
        np.testing.assert_allclose(odds, np.minimum(logits, 13.8), rtol=1e-2, atol=1e-4)
        odds = implementation.blend_cosines(logits, cosines, weights + 1, shares)
        shown = 1.0 / (1.0 + np.exp(-odds.astype(np.float64)))
        np.testing.assert_allclose(shown.sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(shown.argmax(axis=1), cosines.argmax(axis=1))

    def test_a_second_phrase_of_a_class_changes_no_other_class(self, implementation):
        logits, cosines, weights, shares = random_arguments((1, 4, 3, 3))
        shares[:] = 1.0
        alone = implementation.blend_cosines(logits, cosines, weights, shares)
        twice = [np.ascontiguousarray(np.concatenate([x, x[:, :1]], 1)) for x in (logits, cosines)]
        weights = np.append(weights, weights[:1])
        odds = implementation.blend_cosines(*twice, weights, np.float32([0.5, 1, 1, 1, 0.5]))
        expect_equal(odds[:, :4], alone)
        np.testing.assert_array_equal(odds[:, 4], odds[:, 0])

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_rows_that_are_no_phrases_have_no_part(self, implementation, activation):
        logits, cosines, weights, shares = random_arguments((1, 4, 3, 3))
        shares[3] = 0.0
        odds = implementation.blend_cosines(logits, cosines, weights, shares, activation=activation)
        others = [np.ascontiguousarray(x[:, :3]) for x in (logits, cosines)]
        expected = implementation.blend_cosines(
            *others, weights[:3], shares[:3], activation=activation
        )
        expect_equal(odds[:, :3], expected)

    def test_absent_classes_have_no_part(self, implementation):
        logits, cosines, weights, shares = random_arguments((1, 4, 3, 3))
        logits[:, 3] = -np.inf
        odds = implementation.blend_cosines(logits, cosines, weights, shares)
        assert np.all(odds[:, 3] == -np.inf)
        others = [np.ascontiguousarray(x[:, :3]) for x in (logits, cosines)]
        expected = implementation.blend_cosines(*others, weights[:3], shares[:3])
        expect_equal(odds[:, :3], expected)

    @pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
    def test_a_broken_mask_stays_broken(self, implementation, broken):
        logits, cosines, weights, shares = random_arguments((1, 3, 2, 2))
        logits[0, 1, 0, 0] = broken
        odds = implementation.blend_cosines(logits, cosines, weights, shares)
        np.testing.assert_equal(odds[0, 1, 0, 0], np.float32(broken))
        assert np.isfinite(odds[..., 1]).all()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_broken_cosine_is_not_hidden(self, implementation, activation):
        logits, cosines, weights, shares = random_arguments((1, 3, 2, 2))
        cosines[0, 1, 0, 0] = np.nan
        odds = implementation.blend_cosines(logits, cosines, weights, shares, activation=activation)
        assert np.isnan(odds[0, :, 0, 0]).all()
        assert np.isfinite(odds[..., 1]).all()


def test_out_may_be_an_input(device):
    arguments = random_arguments((2, 5, 9, 8))
    expected = reference.blend_cosines(*arguments)
    for index in (0, 1):
        placed = [device.place(argument) for argument in arguments]
        out = placed[index]
        assert ops.blend_cosines(*placed, out=out, stream=device.stream) is out
        expect_equal(device.fetch(out), expected)


@pytest.mark.parametrize("size", [(1, 3, 4, 5), (2, 33, 9, 7), (0, 2, 3, 4)])
@pytest.mark.parametrize("broken", [None, "mask_logits", "cosines"])
def test_tells_whether_the_result_is_finite(device, size, broken):
    arguments = random_arguments(size)
    if broken and arguments[0].size:
        arguments[broken == "cosines"].flat[-1] = np.nan
    placed = [device.place(argument) for argument in arguments]
    finite, workspace = device.poisoned((1,), np.uint8), device.place(np.zeros(8, np.uint8))
    for _ in range(2):  # zeros are left behind
        told = {"finite": finite, "workspace": workspace, "stream": device.stream}
        ops.blend_cosines(*placed, out=device.poisoned(size, np.float32), **told)
        assert device.fetch(finite)[0] == (broken is None or not arguments[0].size)
    assert not device.fetch(workspace).any()


LOGITS, COSINES, WEIGHTS, SHARES = random_arguments((1, 3, 4, 5))
GOOD = {"mask_logits": LOGITS, "cosines": COSINES, "weights": WEIGHTS, "shares": SHARES}
BAD = [
    ({"mask_logits": LOGITS[0]}, ShapeError, "mask_logits"),
    ({"mask_logits": LOGITS.astype(np.float16)}, DTypeError, "mask_logits"),
    ({"mask_logits": LOGITS[:, :0].copy()}, ShapeError, "mask_logits"),
    ({"cosines": COSINES[:, :2].copy()}, ShapeError, "cosines"),
    ({"cosines": COSINES.astype(np.float64)}, DTypeError, "cosines"),
    ({"weights": WEIGHTS[:2].copy()}, ShapeError, "weights"),
    ({"shares": SHARES > 0}, DTypeError, "shares"),
    ({"activation": "none"}, ArgumentError, "activation"),
    ({"out": np.zeros((1, 3, 5, 4), np.float32)}, ShapeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.blend_cosines(**{**GOOD, **change})
