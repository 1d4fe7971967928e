"""From a configuration to a run: data, model, class embeddings, task, evaluation, a first look."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common.checks import check_choice
from zsseg_rt.common.files import write_whole
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.evaluation.datasets import Sample, SegmentationDataset
from zsseg_rt.evaluation.evaluate import evaluate
from zsseg_rt.evaluation.metrics import FIGURES
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.registry import find_builder
from zsseg_rt.results.visualize import palette, save_file
from zsseg_rt.torch_files.clip_space import describe_rows, describe_space
from zsseg_rt.training.class_embeddings import ClassEmbeddings, class_embeddings, region_embeddings
from zsseg_rt.training.config import CONFIG_FILE, ModelConfig, TextConfig, TrainConfig
from zsseg_rt.training.data.loading import TrainingSamples
from zsseg_rt.training.data_checks import require_labels
from zsseg_rt.training.loop import is_run
from zsseg_rt.training.loop.checkpointing import CheckpointFolder
from zsseg_rt.training.loop.loop import BatchSource, RunExtras, TrainingResult, run_loop
from zsseg_rt.training.loop.reporting import Picture
from zsseg_rt.training.loop.run_state import seed_everything
from zsseg_rt.training.parts import (
    batch_source,
    build_augmentation,
    build_model,
    build_task,
    build_zeroseg_task,
    find_task,
    with_crop_of,
)
from zsseg_rt.training.tasks.labelled import LabelledTask, TrainingTask
from zsseg_rt.training.trained.card import (
    TOP_CLASS,
    TrainedClasses,
    describe_model,
    export_trained,
    load_classes,
)
from zsseg_rt.training.trained.segmenter import TorchSegmenter

_log = logging.getLogger(__name__)

BUNDLE, PICTURE = "demo.zsseg", "labelled.png"
_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything that a run needs, built and checked.

    Attributes:
        config: What it was built from.
        dataset: The training data.
        evaluation_dataset: The data checkpoints are evaluated on; None does not evaluate.
        task: Model and objective.
        embeddings: Class embeddings; None for a ZeroSeg without text, which learns without any.
        classes: What is saved about the classes with the model.
        batches: Training batches.
    """

    config: TrainConfig
    dataset: SegmentationDataset
    evaluation_dataset: SegmentationDataset | None
    task: TrainingTask
    embeddings: ClassEmbeddings | None
    classes: TrainedClasses | None
    batches: BatchSource

    @cached_property
    def region_embeds(self) -> Tensor | None:
        """ZegFormer's second embeddings of the classes; computed when first used."""
        templates = self.config.text.region_templates
        return region_embeddings(
            cast(SegmentationModel, self.task.model), self.dataset.class_names, templates
        )

    def phrase_embeds(self, model: nn.Module) -> Tensor:
        """Embeddings of every synonym, as a model has them that is being trained."""
        assert self.embeddings is not None
        if not self.task.tunes_text:
            return self.embeddings.phrase_embeds
        return class_embeddings(self.dataset.class_names, self.config.text, model).phrase_embeds

    def constants(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides weights: embeddings of every synonym, if there are."""
        has_text = self.embeddings is not None
        return {"text_embeds": self.phrase_embeds(self.task.model)} if has_text else {}

    def segmenter(self, model: nn.Module) -> TorchSegmenter:
        """The model as a segmenter to evaluate."""
        assert self.classes is not None
        return TorchSegmenter(
            cast(SegmentationModel, model),
            self.dataset.class_names,
            self.phrase_embeds(model),
            region_embeds=self.region_embeds,
            seen_names=self.classes.lowered_phrases,
            protocol=self.config.evaluation.protocol,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures of a model in percent, by name; also :data:`TOP_CLASS`."""
        assert self.evaluation_dataset is not None
        limit = self.config.evaluation.limit or None
        result = evaluate(self.segmenter(model), self.evaluation_dataset, limit=limit)
        largest = 100 * float(result.counts.sum(axis=0).max() / max(result.counts.sum(), 1))
        return result.scores.as_reported() | {TOP_CLASS: round(largest, 2)}

    def preview(self, model: nn.Module, count: int) -> list[Picture]:
        """Images of what a model predicts: photo, truth and prediction side by side."""
        assert self.evaluation_dataset is not None
        dataset, segmenter = self.evaluation_dataset, self.segmenter(model)
        colours = palette(255).copy()
        own = getattr(dataset, "palette", None)
        if own is not None:
            colours[: len(own)] = own[: len(colours)]
        count = min(count, len(dataset))
        samples = [dataset[index * len(dataset) // count] for index in range(count)]
        return [(s.name, side_by_side(s, segmenter.segment(s.image), colours)) for s in samples]


def train(config: TrainConfig, *, resume: bool = False) -> TrainingResult:
    """Train as a configuration says.

    Started by torchrun or ``accelerate launch``, all processes train together.

    Returns:
        The result; :func:`zsseg_rt.training.trained.card.load_trained` loads the model.
    """
    return train_assembled(assemble(config), resume=resume)


def train_assembled(parts: Assembly, *, resume: bool = False) -> TrainingResult:
    """Train what :func:`assemble` built; see :func:`train`. The task holds the last weights."""
    config, folder = parts.config, Path(parts.config.output.folder)
    _keep_config(config, folder, resume)
    judged = parts.evaluation_dataset is not None
    return run_loop(
        parts.task,
        parts.batches,
        config=config.loop,
        run_folder=folder,
        optimizer=config.optimizer,
        schedule=lambda step: config.schedule.factor(step, config.loop.iterations),
        extras=RunExtras(
            evaluate=parts.evaluate if judged else None,
            preview=parts.preview if judged else None,
            model_card=describe_model(parts.task.model, parts.classes),
            constants=parts.constants,
        ),
        resume=resume,
    )


def assemble(config: TrainConfig, *, dataset: SegmentationDataset | None = None) -> Assembly:
    """Build and check everything a run needs; nothing is trained or written."""
    seed_everything(config.loop.seed)
    if dataset is None:
        dataset = config.open_data("training")
    judged = _open_evaluation(config, dataset)
    if len(dataset.seen) == len(dataset.class_names) and config.loop.best_metric == "hIoU":
        _log.info("loop.best_metric: mIoU, because no class of %s is unseen", dataset.name)
        config = replace(config, loop=replace(config.loop, best_metric="mIoU"))
    if judged is not None:
        check_choice("loop.best_metric", config.loop.best_metric, FIGURES)
    build_augmentation(config.data.augmentation)  # refuse bad settings before weights are read
    model = build_model(config.model, seen=dataset.seen, protocol=config.task.protocol)
    settings = with_crop_of(model, config.data.augmentation)
    config = replace(config, data=replace(config.data, augmentation=settings))
    embeddings, task = _build_objective(config, model, dataset)
    samples = TrainingSamples(dataset, build_augmentation(settings), config.loop.seed)
    batches = batch_source(samples, config.loop)
    classes = None
    if embeddings is not None:
        classes = _describe_classes(config, dataset, embeddings, task)
    if isinstance(task, LabelledTask):
        batches = require_labels(batches, task.label_protocol, dataset)
    return Assembly(
        config=config,
        dataset=dataset,
        evaluation_dataset=judged,
        task=task,
        embeddings=embeddings,
        classes=classes,
        batches=batches,
    )


def _build_objective(
    config: TrainConfig, model: SegmentationModel, dataset: SegmentationDataset
) -> tuple[ClassEmbeddings | None, TrainingTask]:
    if find_task(model.architecture).needs_labels:
        if not dataset.class_names:
            raise ArgumentError(
                f"data.name: expected a data set with classes, which {config.model.architecture} "
                f"needs, got {config.data.name!r}. Name another, or train ZeroSeg."
            )
        embeddings = class_embeddings(dataset.class_names, config.text, model)
        return embeddings, build_task(
            config.task, model, embeddings.class_embeds, dataset, config.text
        )
    has_text = bool(config.text.bank or config.text.clip) or model.text_encoder is not None
    has_text = has_text and bool(dataset.class_names)
    if config.evaluation.split and not has_text:
        raise ArgumentError(
            f"evaluation.split: expected none, because ZeroSeg trains without classes and nothing "
            f"embeds them, got {config.evaluation.split!r}. Set it to '', or give data with "
            "classes and the teacher's text tower as model.options.pretrained."
        )
    size = config.loop.batch_size
    task = build_zeroseg_task(config.task, config.model, model, size, num_images=len(dataset))
    names = dataset.class_names
    return class_embeddings(names, config.text, model) if has_text else None, task


def _describe_classes(
    config: TrainConfig,
    dataset: SegmentationDataset,
    embeddings: ClassEmbeddings,
    task: TrainingTask,
) -> TrainedClasses:
    space = text_space(config.text, config.model)
    if task.tunes_text and not config.text.space:
        space = f"CAT-Seg trained on {dataset.name} (its own text tower)"
    return TrainedClasses(
        names=tuple(dataset.class_names),
        seen=tuple(dataset.seen),
        templates=config.text.templates,
        region_templates=config.text.region_templates,
        space=space,
        phrases=embeddings.phrases,
        dataset=dataset.name,
        protocol=config.task.protocol,
    )


def _open_evaluation(
    config: TrainConfig, dataset: SegmentationDataset
) -> SegmentationDataset | None:
    if not config.evaluation.split:
        return None
    judged = config.open_data("evaluation")
    if tuple(judged.class_names) != tuple(dataset.class_names):
        raise ArgumentError(
            f"evaluation.split: expected the {len(dataset.class_names)} classes of "
            f"{dataset.name}, got {len(judged.class_names)} others in {judged.name}. "
            "Give both splits the same classes."
        )
    return judged


def _keep_config(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Save the resolved configuration; a resumed run must have the same one."""
    if int(os.environ.get("RANK", "0")) != 0:  # set by the launcher: the main process does it
        return
    path = folder / CONFIG_FILE
    started = bool(CheckpointFolder(folder / "checkpoints").steps())
    if started and not resume:
        raise ArgumentError(
            f"output.folder: expected a folder without a run, got {folder}. Pass --resume to "
            "continue that run, or choose another folder."
        )
    if started and path.is_file():
        changed = config.differences(TrainConfig.load(path))
        if changed:
            raise ArgumentError(
                f"config: expected that of the run to resume, got other values of "
                f"{', '.join(changed)}. Resume with --config {path}, or start a new run "
                "(model.start_from takes over the weights)."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, config.to_toml().encode())
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be written: {error.strerror or error}. Check output.folder."
        ) from error


def side_by_side(
    sample: Sample, labels: NDArray[Any], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """An image, its truth and what was found, uint8 ``[H, 3 W, 3]``."""
    sides = [sample.image]
    for shown in (sample.labels, labels):
        narrow = np.minimum(shown, 255).astype(np.uint8)
        sides.append(np.asarray(ops.overlay(sample.image, narrow, colours, alpha=0.6)))
    return np.concatenate(sides, axis=1)


def text_space(text: TextConfig, model: ModelConfig) -> str:
    """Name the joint space: as configured, or after where the class embeddings come from.

    Returns:
        A human-readable name; empty if unknown.
    """
    if text.space:
        return text.space
    if text.bank:
        return describe_rows(text.bank)
    if text.clip:
        return describe_space(text.clip, text.clip_architecture)
    if model.start_from and is_run(model.start_from):
        known = load_classes(model.start_from)
        return "" if known is None else known[0].space
    source = model.options.get("pretrained") or model.start_from
    builder: Any = find_builder(model.architecture, official=False)
    default = inspect.signature(builder).parameters["clip"].default
    return describe_space(source, str(model.options.get("clip", default))) if source else ""


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
