"""Evaluate labels: data sets, figures, the engine as a segmenter; no torch."""

from zsseg_rt.evaluation.datasets import Sample, SegmentationDataset, create_dataset
from zsseg_rt.evaluation.evaluate import EngineSegmenter, Evaluation, Segmenter, evaluate
from zsseg_rt.evaluation.metrics import ConfusionMatrix, SegmentationScores, score

__all__ = [
    "ConfusionMatrix",
    "EngineSegmenter",
    "Evaluation",
    "Sample",
    "SegmentationDataset",
    "SegmentationScores",
    "Segmenter",
    "create_dataset",
    "evaluate",
    "score",
]
