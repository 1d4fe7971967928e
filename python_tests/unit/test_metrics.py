"""Confusion matrices and the papers' figures: official numbers, torchmetrics, and by hand."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.errors import ArgumentError, DatasetError, DTypeError, ShapeError
from zsseg_rt.evaluation.metrics import (
    FIGURES,
    ConfusionMatrix,
    confusion_csv,
    harmonic_mean,
    score,
)


def confusion_of(truth, predicted, num_classes, ignore_label=255):
    confusion = ConfusionMatrix(num_classes, ignore_label=ignore_label)
    confusion.update(truth, predicted)
    return confusion


@pytest.fixture(scope="module")
def official(shared_dir):
    with np.load(shared_dir / "golden" / "zs_metrics_public.npz") as stored:
        return dict(stored)


def test_reproduces_the_official_evaluation(official):
    confusion = ConfusionMatrix(20, ignore_label=255)
    for raw, predicted in zip(official["gts_raw"], official["preds"], strict=True):
        # VOC masks: 0 is background and 255 void, both ignored; class 1 is label 0.
        truth = np.where(raw == 0, 255, raw - (raw != 255)).astype(np.uint8)
        confusion.update(truth, predicted)
    scores = score(confusion.counts, official["seen"].tolist())
    np.testing.assert_allclose(scores.iou, official["IoU"], rtol=1e-12)  # nan where absent
    np.testing.assert_allclose(scores.accuracy, official["Acc"], rtol=1e-12)
    assert scores.pixel_accuracy == pytest.approx(float(official["aAcc"]), rel=1e-12)
    reported = scores.as_reported()
    assert tuple(reported) == FIGURES
    assert reported["mIoU(S)"] == float(official["mIoU_S"])
    assert reported["mIoU(U)"] == float(official["mIoU_U"])
    assert reported["mIoU"] == float(official["mIoU_all"])
    assert reported["hIoU"] == pytest.approx(float(official["hIoU"]), rel=1e-12)


@pytest.mark.parametrize("num_classes", [1, 7, 254, 255, 300])
@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("uint8", "int64"), ("uint16", "uint64"),
                                    ("int32", "uint16")])  # fmt: skip
def test_counts_every_pixel_once(num_classes, dtypes):
    rng = np.random.default_rng(num_classes)
    ignored = 255 if num_classes <= 254 else 65535
    top = [min(num_classes, np.iinfo(dtype).max + 1) for dtype in dtypes]
    truth = rng.integers(0, top[0], (13, 17)).astype(dtypes[0])
    predicted = rng.integers(0, min(top[1] + 40, 256), (13, 17)).astype(dtypes[1])
    if ignored <= np.iinfo(truth.dtype).max:
        truth[rng.random(truth.shape) < 0.2] = ignored
    if predicted.dtype.kind == "i":
        predicted[0] = -1
    counts = confusion_of(truth, predicted, num_classes, ignored).counts
    expected = np.zeros((num_classes, num_classes + 1), np.int64)
    for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if t != ignored:
            expected[t, p if 0 <= p < num_classes else num_classes] += 1
    np.testing.assert_array_equal(counts, expected)


def test_figures_of_pixels_that_are_unknown_absent_or_only_predicted():
    truth = np.zeros((2, 4), np.uint8)
    predicted = np.array([[0, 0, 0, 255], [0, 0, 0, 9]], np.uint8)
    scores = score(confusion_of(truth, predicted, 3).counts, seen=[0])
    assert (scores.pixel_accuracy, scores.iou[0], scores.unknown_pixels) == (0.75, 0.75, 2)
    assert scores.predicted_pixels.tolist() == [6, 0, 0]
    truth, predicted = np.array([0, 0, 255], np.uint8), np.array([0, 1, 2], np.uint8)
    scores = score(confusion_of(truth, predicted, 3).counts, seen=[0, 2])
    np.testing.assert_array_equal(scores.iou, [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(scores.accuracy, [0.5, np.nan, np.nan])
    assert (scores.miou_seen, scores.miou_unseen, scores.hiou) == (0.5, 0.0, 0.0)
    labels = np.array([0, 1], np.uint8)
    scores = score(confusion_of(labels, labels, 2).counts, seen=[0, 1])
    assert scores.miou_seen == 1.0
    assert np.isnan([scores.miou_unseen, scores.hiou]).all()
    scores = score(ConfusionMatrix(2, ignore_label=255).counts, seen=[0])
    assert np.isnan([scores.pixel_accuracy, scores.miou, scores.miou_seen, *scores.iou]).all()
    assert harmonic_mean(0.0, 0.0) == 0.0
    lines = confusion_csv(np.array([[3, 1, 0], [0, 5, 2]]), ["a, b", "ä"]).splitlines()
    assert lines == ['true class,"a, b",ä,(unknown)', '"a, b",3,1,0', "ä,0,5,2"]


def test_errors_name_the_argument():
    confusion = ConfusionMatrix(3, ignore_label=255)
    for dtype in (np.uint8, np.int64):  # a mask of another class list
        with refused(DatasetError, "truth", "255"):
            confusion.update(np.array([[0, 3], [9, 255]], dtype), np.zeros((2, 2), np.uint8))
    assert not confusion.counts.any()
    with refused(ShapeError, "predicted"):
        confusion.update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with refused(DTypeError, "predicted"):
        confusion.update(np.zeros(2, np.uint8), np.zeros(2, np.float32))
    with refused(ArgumentError, "ignore_label"):
        ConfusionMatrix(3, ignore_label=2)
    with refused(ArgumentError, "num_classes"):
        ConfusionMatrix(0, ignore_label=255)
    with refused(ArgumentError, "seen"):
        score(confusion.counts, seen=[3])
    with refused(ShapeError, "counts"):
        score(np.zeros((3, 3), np.int64), seen=[])
    with refused(ShapeError, "counts"):
        confusion_csv(np.zeros((3, 3), np.int64), "abc")
