"""upsample_argmax with a table of labels and a number of classes; the law is ops.reference's."""

import itertools

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

OUT_HW = (43, 37)
RULES = [
    {"activation": "none"},
    {"activation": "sigmoid", "seen_bias": 0.2, "unknown_below": 0.6},
    {"activation": "softmax", "seen_bias": -0.1, "with_scores": True},
]


def random_logits(classes, dtype=np.float32):
    values = np.random.default_rng(classes).standard_normal((2, classes, 6, 5))
    return (2 * values).astype(dtype)


def seen_flags(classes):
    return np.arange(classes) % 3 == 0


def run(device, logits, **settings):
    """Labels and scores; arrays are put on the device."""
    placed = {
        name: device.place(value) if isinstance(value, np.ndarray) else value
        for name, value in settings.items()
    }
    labels, scores = ops.upsample_argmax(
        device.place(logits), OUT_HW, **placed, stream=device.stream
    )
    assert device.holds(labels)
    return device.fetch(labels), None if scores is None else device.fetch(scores)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["activation"])
@pytest.mark.parametrize("classes", [5, 40, 300])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_the_table_s(device, classes, dtype, rule):
    """Also where labels take fewer or more bytes than class indices do."""
    unknown = np.iinfo(dtype).max
    logits, rule = random_logits(classes), rule | {"seen": seen_flags(classes)}
    table = (np.arange(classes + 3) * 7 % 200).astype(dtype)
    table[classes // 2] = unknown
    plain, scores = run(device, logits, **rule)
    labels, same_scores = run(device, logits, **rule, label_table=table)
    assert labels.dtype == dtype
    is_unknown = plain == (255 if classes <= 254 else 65535)
    by_hand = np.where(is_unknown, unknown, table[np.where(is_unknown, 0, plain)])
    np.testing.assert_array_equal(labels, by_hand)
    np.testing.assert_array_equal(same_scores, scores)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["activation"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("count", [0, 1, 3, 17, 40])
def test_classes_beyond_their_number_do_not_exist(device, count, dtype, rule):
    logits = random_logits(40, dtype)
    logits[:, count:] = np.inf  # would win everywhere
    rule = rule | {"seen": seen_flags(40)}
    labels, scores = run(device, logits, **rule, num_classes=np.array([count], np.int32))
    if count == 0:
        assert (labels == 255).all()
        assert scores is None or (scores == 0).all()
        return
    fewer = rule | {"seen": seen_flags(count)}
    expected, expected_scores = run(device, np.ascontiguousarray(logits[:, :count]), **fewer)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("classes", [16, 270])
@pytest.mark.parametrize("counted", [5, 16])
def test_table_and_number_together_match_the_reference(device, classes, counted):
    logits = random_logits(classes)
    settings = {
        "label_table": (np.arange(classes) // 2).astype(np.uint8),
        "num_classes": np.array([counted], np.int32),
        "with_scores": True,
    }
    labels, scores = run(device, logits, **settings)
    expected, expected_scores = reference.upsample_argmax(logits, OUT_HW, **settings)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_pixels_of_no_class_are_unknown_whatever_the_table_says(device):
    logits = np.full((1, 3, 2, 2), np.nan, np.float32)
    for dtype in (np.uint8, np.uint16):
        labels, _ = run(device, logits, label_table=np.zeros(65536, dtype))
        assert (labels == np.iinfo(dtype).max).all()


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("told", "counts"), [(-3, 0), (2, 2), (1000, 9)])
def test_on_a_gpu_the_number_is_read_when_the_kernel_runs(device, told, counts):
    """So that a recorded call serves several vocabularies; out of range, the nearest counts."""
    if device.name == "cpu":
        pytest.skip("the CPU reads it at once")
    logits, number = random_logits(9), device.place(np.array([9], np.int32))
    placed = device.place(logits)
    number.copy_from(np.array([told], np.int32), stream=device.stream)
    labels, _ = ops.upsample_argmax(placed, OUT_HW, num_classes=number, stream=device.stream)
    expected, _ = reference.upsample_argmax(
        logits, OUT_HW, num_classes=np.array([counts], np.int32)
    )
    np.testing.assert_array_equal(device.fetch(labels), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_instruction_set_and_thread_count(dtype):
    logits = random_logits(60)
    settings = {"label_table": np.arange(60)[::-1].astype(dtype), "seen": seen_flags(60)}
    for bias, count in itertools.product([0.0, 0.3], [1, 33, 60]):
        settings |= {"seen_bias": bias, "num_classes": np.array([count], np.int32)}
        labels, _ = ops.upsample_argmax(logits, OUT_HW, **settings)
        expected, _ = reference.upsample_argmax(logits, OUT_HW, **settings)
        np.testing.assert_array_equal(labels, expected)


GOOD = {"logits": np.zeros((1, 4, 3, 3), np.float32), "out_hw": (6, 6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label_table": [1, 2, 3, 4]}, DTypeError, "label_table"),
        (
            {"label_table": np.zeros(4, np.int32)},
            DTypeError,
            "label_table",
        ),
        (
            {"label_table": np.zeros((2, 2), np.uint8)},
            ShapeError,
            "label_table",
        ),
        (
            {"label_table": np.zeros(3, np.uint8)},
            ShapeError,
            "label_table",
        ),
        ({"num_classes": 4}, DTypeError, "num_classes"),
        ({"num_classes": np.array([4])}, DTypeError, "num_classes"),
        (
            {"num_classes": np.zeros(2, np.int32)},
            ShapeError,
            "num_classes",
        ),
        (
            {"num_classes": np.array([5], np.int32)},
            ArgumentError,
            "num_classes",
        ),
        ({"num_classes": np.array([-1], np.int32)}, ArgumentError, "num_classes"),
        (
            {"label_table": np.zeros(4, np.uint8), "out": np.zeros((1, 6, 6), np.uint16)},
            DTypeError,
            "labels",
        ),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    arguments = GOOD | changes
    logits, out_hw = arguments.pop("logits"), arguments.pop("out_hw")
    with refused(error, message):
        ops.upsample_argmax(logits, out_hw, **arguments)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    "given", [{"label_table": np.zeros(4, np.uint8)}, {"num_classes": np.ones(1, np.int32)}]
)
def test_arrays_of_two_devices_are_refused(device, given):
    if device.name == "cpu":
        pytest.skip("needs arrays on a GPU")
    (name,) = given
    with refused(DeviceError, name):
        ops.upsample_argmax(device.place(GOOD["logits"]), (6, 6), **given)
