"""Confusion matrices and the figures that papers report from them, in NumPy.

Totals over all images are summed first; every ratio is computed at the end (as in ``mmseg``, which
ZegCLIP and CLIP-RC use).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError, DatasetError, DTypeError, ShapeError

FIGURES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "mIoU")
"""Names of what :meth:`SegmentationScores.as_reported` returns."""

Labels = npt.NDArray[Any]


class ConfusionMatrix:
    """Counts pixels by true and predicted class.

    A prediction that is not a class (unknown, or any other value out of range) counts as wrong: it
    stays in its true class's total and belongs to no predicted class. Pixels whose true label is
    ``ignore_label`` do not count at all.

    Args:
        num_classes: Number of classes C, at least 1.
        ignore_label: Label of unannotated pixels, outside ``0..C - 1``.

    Attributes:
        counts: int64 ``[C, C + 1]``, rows truth, columns prediction; the last column is the
            pixels without a predicted class.

    Raises:
        ArgumentError: An argument is outside its range.

    Example:
        >>> confusion = ConfusionMatrix(2, ignore_label=255)
        >>> confusion.update(np.array([0, 0, 1, 255]), np.array([0, 1, 255, 0]))
        >>> confusion.counts
        array([[1, 1, 0],
               [0, 0, 1]])
    """

    def __init__(self, num_classes: int, *, ignore_label: int) -> None:
        if num_classes < 1:
            raise ArgumentError(f"num_classes: expected at least 1, got {num_classes}.")
        if 0 <= ignore_label < num_classes:
            raise ArgumentError(
                f"ignore_label: expected a value that is not a class, got {ignore_label} of "
                f"{num_classes} classes. Use 255, or 65535 above 254 classes."
            )
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.counts: npt.NDArray[np.int64] = np.zeros((num_classes, num_classes + 1), np.int64)

    def update(self, truth: Labels, predicted: Labels) -> None:
        """Add the pixels of an image.

        Args:
            truth: Class indices, any integers, any shape; ``ignore_label`` where unannotated.
            predicted: Class indices of the same shape; other values mean no class.

        Raises:
            ShapeError: The shapes differ.
            DTypeError: An array does not hold integers.
            DatasetError: The truth holds a value that is neither a class nor ``ignore_label``.
        """
        if truth.shape != predicted.shape:
            raise ShapeError(
                f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}. "
                "Label images at their own size."
            )
        for name, array in (("truth", truth), ("predicted", predicted)):
            if array.dtype.kind not in "ui":
                raise DTypeError(f"{name}: expected integers, got {array.dtype}. Pass indices.")
        size = self.num_classes + 1  # the last row is truth that is neither a class nor ignored
        pixels, weights = (truth.reshape(-1), predicted.reshape(-1)), None
        if truth.dtype == predicted.dtype == np.uint8:  # faster: first all 65536 pairs of bytes
            both = np.left_shift(pixels[0], 8, dtype=np.uint16) | pixels[1]
            weights, pixels = np.bincount(both, minlength=65536), np.divmod(np.arange(65536), 256)
        rows, columns = (_indices(each, size - 1) for each in pixels)
        rows[pixels[0] == self.ignore_label] = size
        pairs = np.bincount(rows * size + columns, weights, minlength=size * (size + 1))
        pairs = pairs.astype(np.int64).reshape(-1, size)
        if pairs[self.num_classes].any():
            values = np.unique(truth)
            sound = (values >= 0) & (values < self.num_classes) | (values == self.ignore_label)
            raise DatasetError(
                f"truth: expected labels from 0 to {self.num_classes - 1} or {self.ignore_label} "
                f"(ignored), got {', '.join(map(str, values[~sound][:5].tolist()))}. Check that "
                "the masks belong to this class list."
            )
        self.counts += pairs[: self.num_classes]


def confusion_csv(counts: npt.NDArray[np.int64], class_names: Sequence[str]) -> str:
    """A confusion matrix [C, C + 1] as CSV: a row per true class, a column per predicted one."""
    if counts.shape != (len(class_names), len(class_names) + 1):
        raise ShapeError(
            f"counts: expected shape [C, C + 1] for {len(class_names)} names, got "
            f"{list(counts.shape)}"
        )
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["true class", *class_names, "(unknown)"])
    rows.writerows([name, *row] for name, row in zip(class_names, counts.tolist(), strict=True))
    return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class SegmentationScores:
    """Figures of a confusion matrix; all ratios in ``[0, 1]``, NaN where nothing was counted."""

    # Intersection over union of each class, float64 [C]; NaN for a class that neither truth nor
    # prediction holds, 0 for one that is only predicted
    iou: npt.NDArray[np.float64]
    # Share of each class's true pixels that were found, float64 [C]; NaN for a class that the truth
    # does not hold
    accuracy: npt.NDArray[np.float64]
    true_pixels: npt.NDArray[np.int64]  # int64 [C]
    predicted_pixels: npt.NDArray[np.int64]  # int64 [C], annotated pixels only
    unknown_pixels: int  # Annotated pixels without a predicted class
    # Share of annotated pixels with the right class, over all classes together
    pixel_accuracy: float
    miou: float  # Mean of iou without NaN
    miou_seen: float  # The same over seen classes; NaN if none was counted
    miou_unseen: float  # The same over unseen classes; NaN if none was counted

    @property
    def hiou(self) -> float:
        """Harmonic mean of seen and unseen mIoU; NaN if either is."""
        return harmonic_mean(self.miou_seen, self.miou_unseen)

    def as_reported(self) -> dict[str, float]:
        """The figures as the papers print them, in percent.

        As in the official evaluation, each figure is rounded to two decimals. ``hIoU`` is computed
        from the rounded seen and unseen mIoU, as in the papers' tables, and not rounded again.
        """
        seen, unseen = _percent(self.miou_seen), _percent(self.miou_unseen)
        return {
            "pAcc": _percent(self.pixel_accuracy),
            "mIoU(S)": seen,
            "mIoU(U)": unseen,
            "hIoU": harmonic_mean(seen, unseen),
            "mIoU": _percent(self.miou),
        }


def score(counts: npt.NDArray[np.int64], seen: Sequence[int]) -> SegmentationScores:
    """Compute the figures of a confusion matrix.

    ``IoU = TP / (truth + predicted - TP)``.

    Args:
        counts: int64 ``[C, C + 1]``; see :class:`ConfusionMatrix`.
        seen: Indices of the seen classes; all others are unseen.

    Raises:
        ShapeError: The counts have another shape.
        ArgumentError: ``seen`` names a class that does not exist.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023, section 4.1; Xian et al., "Semantic Projection Network
        for Zero- and Few-Label Semantic Segmentation", CVPR 2019, for the harmonic mean.
    """
    if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1:
        raise ShapeError(f"counts: expected [C, C + 1], got {counts.shape}. Use ConfusionMatrix.")
    num_classes = len(counts)
    if any(not 0 <= index < num_classes for index in seen):
        raise ArgumentError(
            f"seen: expected indices from 0 to {num_classes - 1}, got {sorted(seen)}. "
            "Use the data set's."
        )
    is_seen = np.zeros(num_classes, bool)
    is_seen[list(seen)] = True
    hit = np.diagonal(counts).astype(np.float64)
    truth, predicted = counts.sum(axis=1), counts[:, :-1].sum(axis=0)
    iou = _ratio(hit, truth + predicted - hit)
    return SegmentationScores(
        iou=iou,
        accuracy=_ratio(hit, truth),
        true_pixels=truth,
        predicted_pixels=predicted,
        unknown_pixels=int(counts[:, -1].sum()),
        pixel_accuracy=float(hit.sum() / truth.sum()) if truth.any() else math.nan,
        miou=_mean(iou),
        miou_seen=_mean(iou[is_seen]),
        miou_unseen=_mean(iou[~is_seen]),
    )


def harmonic_mean(first: float, second: float) -> float:
    """``2ab / (a + b)``; 0 if both are 0, NaN if either is NaN."""
    total = first + second
    return 0.0 if total == 0 else 2 * first * second / total


def _indices(labels: Labels, num_classes: int) -> npt.NDArray[np.intp]:
    """Labels as indices; all that are not a class become ``num_classes``."""
    inside = (labels >= 0) & (labels < num_classes)
    return np.where(inside, labels, np.intp(num_classes)).astype(np.intp, copy=False)


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    ratio = np.full(len(part), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(values: npt.NDArray[np.float64]) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else math.nan


def _percent(share: float) -> float:
    return float(np.round(share * 100, 2))
