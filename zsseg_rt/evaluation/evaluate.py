"""Evaluate anything that labels images on annotated data: models and bundles, without torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.files import sha256_of
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError, DatasetError
from zsseg_rt.evaluation.datasets.base import SegmentationDataset
from zsseg_rt.evaluation.metrics import ConfusionMatrix, SegmentationScores, score
from zsseg_rt.evaluation.provenance import describe_machine
from zsseg_rt.runtime.lane_pool import in_order
from zsseg_rt.text.class_names import join_synonyms, split_synonyms

Progress = Callable[[int, int], None]
"""Called after each image with how many are done and how many there are."""


class Segmenter(Protocol):
    """Labels images with a fixed list of classes: ``class_names``, one phrase per class.

    They are in the data set's order; commas separate synonyms.
    """

    class_names: tuple[str, ...]

    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label an image, RGB uint8 [H, W, 3]: integers [H, W], indices into ``class_names``.

        Any other value means no class.
        """

    def describe(self) -> dict[str, Any]:
        """The segmenter as plain data: kind, name, weights' hash, protocol, device, precision."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a segmenter labelled a data set."""

    dataset: str  # Name of the data set
    pictures: int  # How many were labelled
    dataset_size: int  # How many there are
    class_names: tuple[str, ...]  # The data set's own names
    asked_names: tuple[str, ...]  # What the segmenter was asked for, class by class
    seen: tuple[int, ...]  # Indices of the seen classes
    # Confusion counts, int64 [C, C + 1]; see :class:`zsseg_rt.evaluation.metrics.ConfusionMatrix`
    counts: npt.NDArray[np.int64]
    # Seconds of all and inside the segmenter, an image's median milliseconds inside it, and the
    # share of the time in which it did not work
    times: dict[str, float]
    segmenter: dict[str, Any]  # What labelled; see :meth:`Segmenter.describe`
    machine: dict[str, str]  # Processor, system and versions

    @property
    def scores(self) -> SegmentationScores:
        """The figures of the confusion counts."""
        return score(self.counts, self.seen)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; figures in percent, null where nothing was counted."""
        return {
            "dataset": self.dataset,
            "pictures": self.pictures,
            "dataset_size": self.dataset_size,
            "metrics_percent": _without_nan(self.scores.as_reported()),
            "unknown_pixels": self.scores.unknown_pixels,
            "classes": self.class_table(),
            "confusion": self.counts.tolist(),
            "times": {name: round(value, 4) for name, value in self.times.items()},
            "segmenter": self.segmenter,
            "machine": self.machine,
        }

    def class_table(self) -> list[dict[str, Any]]:
        """One row per class: names, whether seen, IoU and accuracy in percent, pixel counts."""
        scores, seen = self.scores, set(self.seen)
        return [
            {
                "name": name,
                "asked_as": self.asked_names[index],
                "seen": index in seen,
                "iou_percent": _percent_or_none(scores.iou[index]),
                "accuracy_percent": _percent_or_none(scores.accuracy[index]),
                "true_pixels": int(scores.true_pixels[index]),
                "predicted_pixels": int(scores.predicted_pixels[index]),
            }
            for index, name in enumerate(self.class_names)
        ]


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    limit: int | None = None,
    on_picture: Progress | None = None,
) -> Evaluation:
    """Label a data set's images and compare with its masks.

    Images are decoded ahead in a thread, so that the segmenter rarely waits.

    Args:
        segmenter: What labels; its classes are the data set's, in the data set's order.
        dataset: Annotated images.
        limit: At most this many images, spread evenly over the set; None takes all.
        on_picture: Called after each image.

    Raises:
        ArgumentError: The class lists differ in length, or ``limit`` is below 1.
        DatasetError: The set is empty, or an image or mask is unusable.
        ShapeError: The segmenter returned labels of another size than the image's.
    """
    names = tuple(dataset.class_names)
    if len(segmenter.class_names) != len(names):
        raise ArgumentError(
            f"class_names: expected {len(names)}, one for each class of {dataset.name}, got "
            f"{len(segmenter.class_names)}. Keep the data set's order."
        )
    indices = _choose(len(dataset), limit, dataset.name)
    matrix = ConfusionMatrix(len(names), ignore_label=dataset.ignore_label)
    times: list[float] = []
    start = time.perf_counter()
    for done, sample in enumerate(in_order(dataset.__getitem__, indices, num_threads=1), start=1):
        begin = time.perf_counter()
        labels = segmenter.segment(sample.image)
        times.append(time.perf_counter() - begin)
        try:
            matrix.update(sample.labels, labels)
        except DatasetError as exc:
            raise DatasetError(f"{sample.name}: {exc}") from exc
        if on_picture is not None:
            on_picture(done, len(indices))
    total, inside = time.perf_counter() - start, sum(times)
    return Evaluation(
        dataset=dataset.name,
        pictures=len(indices),
        dataset_size=len(dataset),
        class_names=names,
        asked_names=tuple(segmenter.class_names),
        seen=tuple(dataset.seen),
        counts=matrix.counts,
        times={
            "total_seconds": total,
            "segment_seconds": inside,
            "median_segment_ms": 1e3 * float(np.median(times)),
            "share_outside_segmenter": 1 - inside / total,
        },
        segmenter=segmenter.describe(),
        machine=describe_machine(),
    )


def _choose(size: int, limit: int | None, dataset: str) -> list[int]:
    """Indices of the images to take, spread evenly."""
    if size == 0:
        raise DatasetError(f"{dataset}: expected at least one image, got none. Check the split.")
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit: expected at least 1, got {limit}. Leave it out for all.")
    count = size if limit is None else min(limit, size)
    return [index * size // count for index in range(count)]


def _percent_or_none(share: float) -> float | None:
    return None if math.isnan(share) else round(100 * float(share), 2)


def _without_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else round(x, 6) for name, x in figures.items()}


class EngineSegmenter:
    """Labels images as the engine does in use: the whole image, resized to the bundle's input.

    Args:
        engine: An open engine for RGB; its classes are set here and must stay.
        class_names: One phrase per class; commas separate synonyms, of which the best one counts.
        embeddings: float32 ``[P, D]`` to use instead of the bundle's text side, a row per phrase.
        templates: Prompts with one ``{}`` each; the bundle's if None.
        protocol: ``"whole"``. Sliding windows average the scores of all classes over windows; an
            engine never holds these, only labels.

    Attributes:
        class_names: As given.

    Raises:
        ArgumentError: The protocol is not ``"whole"``, or the engine takes BGR.
        VocabularyError: The bundle cannot embed a name.
    """

    def __init__(
        self,
        engine: Engine,
        class_names: Sequence[str],
        *,
        embeddings: npt.NDArray[np.float32] | None = None,
        templates: Sequence[str] | None = None,
        protocol: str = "whole",
    ) -> None:
        if protocol != "whole":
            raise ArgumentError(
                f"protocol: expected 'whole' for a bundle, got {protocol!r}. An engine gives "
                "labels, not the scores that windows are averaged over; evaluate the torch model "
                "to slide."
            )
        if engine.config.channel_order != "rgb":
            raise ArgumentError(
                f"engine: expected channel_order 'rgb', got {engine.config.channel_order!r}. "
                "Data sets are RGB; create the engine with EngineConfig(channel_order='rgb')."
            )
        classes = split_synonyms(class_names)
        engine.set_classes(classes, embeddings=embeddings, background=(), templates=templates)
        self.class_names = join_synonyms(classes)
        self._engine = engine

    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        return self._engine.segment(image).labels

    def describe(self) -> dict[str, Any]:
        """Bundle, backend, device, precision, and the family's settings that were given."""
        engine, bundle = self._engine, self._engine.bundle
        settings = {name: getattr(engine.config, name) for name in FAMILIES[bundle.family].settings}
        return {
            "kind": "bundle",
            "name": bundle.name,
            "architecture": bundle.architecture,
            "sha256": sha256_of(bundle.path / "bundle.json"),  # which names all files' hashes
            "protocol": "whole",
            "size_hw": list(bundle.preprocess.size_hw),
            "backend": engine.backend,
            "device": engine.device,
            "precision": engine.precision,
            "seen_bias": bundle.head.seen_bias if bundle.head.seen else 0.0,
            "settings": {name: value for name, value in settings.items() if value is not None},
        }
