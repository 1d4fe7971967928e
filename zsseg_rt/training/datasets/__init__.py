"""Segmentation data sets: pictures, label maps, and which classes are seen."""

from zsseg_rt.training.datasets.base import Sample, SegmentationDataset
from zsseg_rt.training.datasets.registry import DATASETS, create_dataset

__all__ = ["DATASETS", "Sample", "SegmentationDataset", "create_dataset"]
