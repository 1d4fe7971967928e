"""A first training run: train, export, and draw what the bundle labels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from zsseg_rt.engine import Engine
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.results.visualize import palette, save_file
from zsseg_rt.training.assembly import side_by_side, train
from zsseg_rt.training.config import TrainConfig
from zsseg_rt.training.loop.loop import TrainingResult
from zsseg_rt.training.trained.card import export_trained

BUNDLE, PICTURE = "demo.zsseg", "labelled.png"
_ROWS = 4


def train_and_show(
    config: TrainConfig, *, resume: bool = False
) -> tuple[TrainingResult, Path, Path]:
    """Train as a configuration says, export the best checkpoint and draw what it labels.

    Returns:
        The result, and where in the run's folder the bundle and the picture are: scenes, truth and
        the bundle's labels side by side. A run that was stopped has neither.
    """
    result, folder = train(config, resume=resume), Path(config.output.folder)
    if result.finished:
        export_trained(folder, folder / BUNDLE, precisions=("float32",), overwrite=True)
        dataset = config.open_data("evaluation" if config.evaluation.split else "training")
        draw(folder / BUNDLE, dataset, folder / PICTURE)
    return result, folder / BUNDLE, folder / PICTURE


def draw(bundle: Path, dataset: SegmentationDataset, path: Path) -> None:
    """Draw the first images of a data set: image, truth and a bundle's labels, row by row."""
    colours = palette(255)
    rows = []
    with Engine(bundle) as engine:
        engine.set_classes(list(dataset.class_names))
        for index in range(min(_ROWS, len(dataset))):
            sample = dataset[index]
            rows.append(side_by_side(sample, engine.segment(sample.image).labels, colours))
    doubled = np.concatenate(rows, axis=0).repeat(2, axis=0).repeat(2, axis=1)
    save_file(path, cv2.imencode(".png", doubled[..., ::-1])[1].tobytes())
