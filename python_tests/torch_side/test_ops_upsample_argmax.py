"""upsample_argmax: the law is ops.reference.upsample_argmax."""

import itertools

import numpy as np
import pytest

from support.errors import refused
from support.label_agreement import assert_labels_agree, top_two_margin
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

ACTIVATIONS = ["none", "sigmoid", "softmax"]
SHAPES = [  # batch, classes, grid, image
    ((1, 1, 1, 1), (1, 1)),
    ((2, 2, 1, 5), (7, 1)),
    ((1, 3, 4, 1), (1, 33)),
    ((3, 20, 5, 7), (61, 83)),
    ((1, 171, 8, 9), (64, 72)),
    ((1, 300, 4, 4), (37, 19)),
    ((1, 1000, 3, 2), (12, 31)),
    ((1, 21, 32, 33), (11, 7)),
    ((1, 6, 32, 33), (375, 113)),
]
SCORE_TOLERANCE = 2e-6  # exp and division in float32 against float64; a softmax drops e^-25 terms


def random_logits(*shape, scale=2.0, dtype=np.float32):
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


def some_seen(classes):
    return np.arange(classes) % 3 == 0


@pytest.mark.parametrize(("shape", "out_hw"), SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seen_bias", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_matches_reference(device, shape, out_hw, activation, seen_bias, dtype):
    logits = random_logits(*shape, dtype=dtype)
    seen = some_seen(shape[1])
    arguments = {"activation": activation, "seen": seen, "seen_bias": seen_bias}
    labels, scores = ops.upsample_argmax(
        device.place(logits), out_hw, **arguments, with_scores=True, stream=device.stream
    )
    assert device.holds(labels)
    assert device.holds(scores)
    fetched = device.fetch(labels)
    assert_labels_agree(logits, out_hw, fetched, arguments)
    _, expected = reference.upsample_argmax(logits, out_hw, **arguments, with_scores=True)
    clear = top_two_margin(logits, out_hw, **arguments) > 1e-5
    np.testing.assert_allclose(
        device.fetch(scores)[clear], expected[clear], rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE
    )
    bare, none = ops.upsample_argmax(
        device.place(logits), out_hw, **arguments, stream=device.stream
    )
    assert none is None
    assert_labels_agree(logits, out_hw, device.fetch(bare), arguments)


@pytest.mark.parametrize("out_hw", [(90, 300), (1, 1031), (700, 4)])
@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
@pytest.mark.parametrize("with_scores", [False, True])
def test_cells_of_many_pixels(device, grid, out_hw, with_scores):
    logits = random_logits(1, 9, *grid)
    labels, scores = ops.upsample_argmax(
        device.place(logits), out_hw, with_scores=with_scores, stream=device.stream
    )
    expected, expected_scores = reference.upsample_argmax(logits, out_hw, with_scores=with_scores)
    np.testing.assert_array_equal(device.fetch(labels), expected)
    if with_scores:
        np.testing.assert_array_equal(device.fetch(scores), expected_scores)


@pytest.mark.parametrize("classes", [7, 300])
@pytest.mark.parametrize("out_hw", [(64, 80), (53, 67)])
def test_areas_that_one_class_wins_are_filled(device, classes, out_hw):
    """Up to where the next one begins, whether rows of the result are aligned or not."""
    logits = random_logits(2, classes, 6, 8)
    logits[:, 3, :, :4] += 50
    logits[:, 5, :, 4:] += 50
    logits[1, 2, 2, 6] = 90
    for dtype in (np.float32, np.float16):
        labels, _ = ops.upsample_argmax(
            device.place(logits.astype(dtype)), out_hw, stream=device.stream
        )
        expected, _ = reference.upsample_argmax(logits.astype(dtype), out_hw)
        np.testing.assert_array_equal(device.fetch(labels), expected)


@pytest.mark.parametrize(
    ("activation", "threshold"), [("none", 2.0), ("sigmoid", 0.9), ("softmax", 0.3)]
)
@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize("classes", [40, 300])
def test_marks_scores_below_the_threshold(device, activation, threshold, with_scores, classes):
    logits = random_logits(2, classes, 6, 5, scale=1.5)
    arguments = {
        "activation": activation,
        "seen": some_seen(classes),
        "seen_bias": 0.1,
        "unknown_below": threshold,
    }
    labels, _ = ops.upsample_argmax(
        device.place(logits), (50, 41), **arguments, with_scores=with_scores, stream=device.stream
    )
    fetched = device.fetch(labels)
    assert_labels_agree(logits, (50, 41), fetched, arguments)
    assert 0.02 < np.mean(fetched == (255 if classes == 40 else 65535)) < 0.999


def test_writes_into_out(device):
    logits = random_logits(2, 9, 4, 4)
    out = (device.poisoned((2, 30, 33), np.uint8), device.poisoned((2, 30, 33), np.float32))
    labels, scores = ops.upsample_argmax(
        device.place(logits), (30, 33), with_scores=True, out=out, stream=device.stream
    )
    assert labels is out[0]
    assert scores is out[1]
    assert device.holds(labels)
    expected = reference.upsample_argmax(logits, (30, 33), with_scores=True)
    np.testing.assert_array_equal(device.fetch(labels), expected[0])
    np.testing.assert_allclose(device.fetch(scores), expected[1], rtol=SCORE_TOLERANCE)
    only_labels = device.poisoned((2, 30, 33), np.uint8)
    labels, scores = ops.upsample_argmax(
        device.place(logits), (30, 33), out=only_labels, stream=device.stream
    )
    assert labels is only_labels
    assert scores is None
    np.testing.assert_array_equal(device.fetch(labels), expected[0])


def test_no_images_give_no_labels(device):
    logits = np.empty((0, 5, 4, 4), np.float32)
    labels, scores = ops.upsample_argmax(
        device.place(logits), (8, 9), with_scores=True, stream=device.stream
    )
    assert device.fetch(labels).shape == device.fetch(scores).shape == (0, 8, 9)


@pytest.mark.parametrize("num_seen", [0, 1, 16, 33, 34])
def test_any_number_of_classes_may_be_seen(device, num_seen):
    logits = random_logits(1, 34, 6, 6)
    arguments = {"activation": "sigmoid", "seen": np.arange(34) < num_seen, "seen_bias": 0.4}
    for seen in (arguments["seen"], device.place(arguments["seen"])):
        labels, _ = ops.upsample_argmax(
            device.place(logits), (70, 50), **(arguments | {"seen": seen}), stream=device.stream
        )
        assert_labels_agree(logits, (70, 50), device.fetch(labels), arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_absent_classes_never_win(device, activation):
    logits = random_logits(1, 5, 4, 4) - 20
    logits[:, 1] = np.nan
    logits[:, 3] = -np.inf
    logits[0, 2, 0, 0] = np.nan
    labels, _ = ops.upsample_argmax(
        device.place(logits), (23, 31), activation=activation, stream=device.stream
    )
    fetched = device.fetch(labels)
    assert set(np.unique(fetched)) <= {0, 2, 4}
    expected, _ = reference.upsample_argmax(logits, (23, 31), activation=activation)
    assert np.mean(fetched == expected) > 0.999


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pixels_without_a_class_are_unknown(device, activation):
    logits = np.full((1, 3, 2, 2), np.nan, np.float32)
    arguments = {"activation": activation, "with_scores": True}
    labels, scores = ops.upsample_argmax(
        device.place(logits), (5, 6), **arguments, stream=device.stream
    )
    expected_labels, expected_scores = reference.upsample_argmax(logits, (5, 6), **arguments)
    assert np.all(device.fetch(labels) == 255)
    np.testing.assert_array_equal(device.fetch(labels), expected_labels)
    np.testing.assert_array_equal(device.fetch(scores), expected_scores)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("classes", [20, 300])
def test_every_instruction_set_and_thread_count(dtype, classes):
    logits = random_logits(1, classes, 7, 9, dtype=dtype)
    for activation, seen_bias in itertools.product(["none", "sigmoid"], [0.0, 0.1]):
        arguments = {"activation": activation, "seen": some_seen(classes), "seen_bias": seen_bias}
        labels, _ = ops.upsample_argmax(logits, (61, 117), **arguments)
        assert_labels_agree(logits, (61, 117), labels, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("grid", "out_hw"), [((5, 7), (61, 83)), ((9, 8), (4, 5)), ((1, 3), (9, 1))]
)
def test_reference_agrees_with_torch(activation, grid, out_hw):
    torch = pytest.importorskip("torch")
    logits = random_logits(2, 13, *grid)
    values = torch.nn.functional.interpolate(
        torch.from_numpy(logits), size=out_hw, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(
        reference.upsample_bilinear(logits, out_hw), values.numpy(), atol=5e-6
    )
    activate = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(1)}
    activated = activate[activation](values)
    seen = some_seen(13)
    lowered = activated - 0.2 * torch.from_numpy(seen)[:, None, None]
    winners = lowered.argmax(1)
    arguments = {"activation": activation, "seen": seen, "seen_bias": 0.2}
    labels, scores = reference.upsample_argmax(logits, out_hw, **arguments, with_scores=True)
    clear = top_two_margin(logits, out_hw, **arguments) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], winners.numpy()[clear])
    winning = activated.gather(1, winners[:, None])[:, 0].numpy()
    np.testing.assert_allclose(scores[clear], winning[clear], atol=5e-6)


GOOD = {"logits": np.zeros((1, 4, 3, 3), np.float32), "out_hw": (6, 6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": np.zeros((1, 4, 3, 3))}, DTypeError, "logits"),
        ({"logits": np.zeros((4, 3, 3), "f4")}, ShapeError, "logits"),
        (
            {"logits": np.zeros((1, 0, 3, 3), "f4")},
            ShapeError,
            "logits",
        ),
        ({"logits": np.zeros((1, 4, 0, 3), "f4")}, ShapeError, "logits"),
        ({"logits": np.zeros((1, 4, 3, 6), "f4")[..., ::2]}, ShapeError, "logits"),
        ({"logits": [1.0]}, DTypeError, "logits"),
        ({"out_hw": (0, 6)}, ShapeError, "out_hw"),
        ({"out_hw": (6, 32768)}, ShapeError, "out_hw"),
        ({"activation": "relu"}, ArgumentError, "activation"),
        ({"seen": np.zeros(5, bool)}, ShapeError, "seen"),
        ({"seen": np.zeros(4, "u1")}, DTypeError, "seen"),
        ({"seen_bias": np.inf}, ArgumentError, "seen_bias"),
        ({"unknown_below": np.nan}, ArgumentError, "unknown_below"),
        ({"out": np.zeros((1, 6, 6), "u2")}, DTypeError, "labels"),
        ({"out": np.zeros((1, 6, 5), "u1")}, ShapeError, "labels"),
        ({"out": (None, np.zeros((1, 6, 6), "f4"))}, ArgumentError, "out"),
        ({"out": (None, None, None)}, ArgumentError, "out"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = GOOD | changes
    with refused(error, message):
        ops.upsample_argmax(arguments.pop("logits"), arguments.pop("out_hw"), **arguments)


@pytest.mark.needs_cuda
def test_arrays_of_two_devices_are_refused(device):
    if device.name == "cpu":
        pytest.skip("needs arrays on a GPU")
    with refused(DeviceError, "labels", "logits"):
        ops.upsample_argmax(device.place(GOOD["logits"]), (6, 6), out=np.zeros((1, 6, 6), "u1"))


def aligned_bytes(size, offset=0):
    """A host array uint8 [size] that begins ``offset`` bytes past a multiple of 64."""
    memory = np.empty(size + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    return memory[first : first + size]


def test_a_lent_workspace_changes_nothing(device):
    """Whatever it holds."""
    logits = random_logits(1, 21, 5, 4)
    if device.name == "cpu":
        workspace = aligned_bytes(1 << 20)
        workspace[:] = 0xFF
    else:
        workspace = device.poisoned((64,), np.uint8)
    expected, _ = ops.upsample_argmax(device.place(logits), (33, 29), stream=device.stream)
    labels, _ = ops.upsample_argmax(
        device.place(logits), (33, 29), workspace=workspace, stream=device.stream
    )
    assert device.holds(labels)
    np.testing.assert_array_equal(device.fetch(labels), device.fetch(expected))


def test_a_workspace_that_does_not_fit_is_refused():
    logits, workspace = random_logits(1, 21, 5, 4), aligned_bytes(3)
    with refused(ShapeError, "workspace"):
        ops.upsample_argmax(logits, (33, 29), workspace=workspace)


def test_an_unaligned_workspace_is_refused():
    logits, workspace = random_logits(1, 21, 5, 4), aligned_bytes(1 << 20, offset=1)
    with refused(ShapeError, "workspace"):
        ops.upsample_argmax(logits, (33, 29), workspace=workspace)
