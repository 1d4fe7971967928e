"""Segmentation data sets: images, label maps, and which classes are seen."""

from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.evaluation.datasets.registry import DATASETS, create_dataset

__all__ = ["DATASETS", "Sample", "SegmentationDataset", "create_dataset"]
