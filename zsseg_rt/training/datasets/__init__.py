"""Segmentation data sets: pictures, label maps, and which classes are seen."""

from zsseg_rt.training.datasets.base import Sample, SegmentationDataset

__all__ = ["Sample", "SegmentationDataset"]
