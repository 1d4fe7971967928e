"""A first training run: train, export, and draw what the bundle labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt.engine import Engine
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.results.visualize import palette, save_file
from zsseg_rt.training.assembly import side_by_side, train
from zsseg_rt.training.config import TrainConfig
from zsseg_rt.training.loop.loop import TrainingResult
from zsseg_rt.training.trained.card import export_trained

BUNDLE, PICTURE = "demo.zsseg", "labelled.png"
_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """What a first run leaves.

    Attributes:
        result: Of the training.
        bundle: The exported bundle; None if training was stopped.
        picture: Scenes, truth and the bundle's labels side by side; None if training was stopped.
    """

    result: TrainingResult
    bundle: Path | None = None
    picture: Path | None = None


def train_and_show(config: TrainConfig, *, resume: bool = False) -> FirstRun:
    """Train as a configuration says, export the best checkpoint and draw what it labels.

    Bundle and picture are written into the run's folder.

    Returns:
        Where everything is. A run that was stopped is not exported.
    """
    result = train(config, resume=resume)
    if not result.finished:
        return FirstRun(result=result)
    folder = Path(config.output.folder)
    bundle = export_trained(folder, folder / BUNDLE, precisions=("float32",), overwrite=True)
    dataset = config.open_data("evaluation" if config.evaluation.split else "training")
    picture = draw(bundle, dataset, folder / PICTURE)
    return FirstRun(result=result, bundle=bundle, picture=picture)


def draw(bundle: Path, dataset: SegmentationDataset, path: Path) -> Path:
    """Draw the first images of a data set: image, truth and a bundle's labels, row by row."""
    colours = palette(255)
    rows = []
    with Engine(bundle) as engine:
        engine.set_classes(list(dataset.class_names))
        for index in range(min(_ROWS, len(dataset))):
            sample = dataset[index]
            found = engine.segment(sample.image).labels
            rows.append(side_by_side(sample, found, colours))
    _write(path, rows)
    return path


def _write(path: Path, rows: Iterable[npt.NDArray[np.uint8]]) -> None:
    picture = np.concatenate(list(rows), axis=0)
    doubled = picture.repeat(2, axis=0).repeat(2, axis=1)
    save_file(path, cv2.imencode(".png", doubled[..., ::-1])[1].tobytes())
