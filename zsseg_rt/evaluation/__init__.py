"""Evaluate labels: data sets, figures, the engine as a segmenter; no torch."""

from zsseg_rt.evaluation.datasets import Sample, SegmentationDataset, create_dataset
from zsseg_rt.evaluation.evaluate import (
    Comparison,
    EngineSegmenter,
    Evaluation,
    Segmenter,
    compare,
    evaluate,
)
from zsseg_rt.evaluation.metrics import ConfusionMatrix, SegmentationScores, score

__all__ = [
    "Comparison",
    "ConfusionMatrix",
    "EngineSegmenter",
    "Evaluation",
    "Sample",
    "SegmentationDataset",
    "SegmentationScores",
    "Segmenter",
    "compare",
    "create_dataset",
    "evaluate",
    "score",
]
