"""count_labels: the law is ops.reference.count_labels."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference


def random_labels(shape, num_classes, dtype):
    """Classes, two labels that are none, unknown, in runs as in a picture."""
    unknown = np.iinfo(dtype).max
    values = np.append(np.arange(min(num_classes + 2, unknown)), unknown).astype(dtype)
    rng = np.random.default_rng(num_classes)
    count = int(np.prod(shape))
    runs = rng.integers(1, 40, count + 1)
    return np.repeat(rng.choice(values, count + 1), runs)[:count].reshape(shape)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (13, 17), (3, 1, 67, 61)])
@pytest.mark.parametrize(
    ("dtype", "num_classes"),
    [
        *[(np.uint8, count) for count in (0, 1, 20, 254, 255, 256, 300)],
        *[(np.uint16, count) for count in (0, 1, 300, 2047, 2048, 65534)],
    ],
)
def test_equals_reference(device, shape, dtype, num_classes):
    labels = random_labels(shape, num_classes, dtype)
    out = device.poisoned((num_classes + 1,), np.int64)
    placed = device.place(labels)
    assert ops.count_labels(placed, num_classes, out=out, stream=device.stream) is out
    assert device.holds(out)
    expected = reference.count_labels(labels, num_classes)
    assert expected.sum() == labels.size
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize(("dtype", "num_classes"), [(np.uint8, 20), (np.uint16, 5000)])
def test_every_instruction_set_and_thread_count(dtype, num_classes):
    labels = random_labels((721, 1279), num_classes, dtype)
    counts = ops.count_labels(labels, num_classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, reference.count_labels(labels, num_classes))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_no_class_is_counted_last(device, dtype):
    unknown = np.iinfo(dtype).max
    labels = np.array([[0, 2, 2], [3, unknown - 1, unknown]], dtype)
    counts = ops.count_labels(device.place(labels), 3, stream=device.stream)
    assert device.holds(counts)
    assert device.fetch(counts).tolist() == [1, 0, 2, 3]


def test_unknown_is_no_class_however_many_there_are(device):
    labels = device.place(np.array([254, 255], np.uint8))
    counts = ops.count_labels(labels, 256, stream=device.stream)
    assert device.holds(counts)
    assert device.fetch(counts)[-3:].tolist() == [1, 0, 1]


def test_more_labels_than_a_grid_takes_at_once(device):
    labels = random_labels((2_200_003,), 20, np.uint8)
    counts = ops.count_labels(device.place(labels), 20, stream=device.stream)
    assert device.holds(counts)
    np.testing.assert_array_equal(device.fetch(counts), reference.count_labels(labels, 20))


@pytest.mark.parametrize("value", [0, 19, 255])
def test_one_label_everywhere(device, value):
    labels = np.full((360, 641), value, np.uint8)
    counts = ops.count_labels(device.place(labels), 20, stream=device.stream)
    assert device.holds(counts)
    np.testing.assert_array_equal(device.fetch(counts), reference.count_labels(labels, 20))


GOOD = {"labels": np.zeros((4, 5), np.uint8), "num_classes": 3}
BAD = [
    ({"labels": np.zeros(3, np.int64)}, DTypeError, "labels"),
    ({"labels": np.zeros((4, 4), np.uint8)[:, ::2]}, ShapeError, "labels"),
    ({"num_classes": -1}, ArgumentError, "num_classes"),
    ({"num_classes": 65535}, ArgumentError, "num_classes"),
    ({"out": np.zeros(3, np.int64)}, ShapeError, "out"),
    ({"out": np.zeros(4, np.int32)}, DTypeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.count_labels(**{**GOOD, **change})
