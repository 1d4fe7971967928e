"""From a configuration to a run: data, model, class embeddings, task, evaluation, a first look."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common import schema
from zsseg_rt.common.checks import arguments_called, check_choice
from zsseg_rt.common.files import write_whole
from zsseg_rt.common.schema import checked_settings, setting_names, typed_settings
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError, SourceError
from zsseg_rt.evaluation.datasets import Sample, SegmentationDataset
from zsseg_rt.evaluation.evaluate import evaluate
from zsseg_rt.evaluation.metrics import FIGURES
from zsseg_rt.models import create_model, from_official, load_checkpoint, normalize_state_dict
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.clip.weights import build_image_encoder, load_clip
from zsseg_rt.models.registry import find_builder
from zsseg_rt.models.zeroseg.model import ZeroSeg
from zsseg_rt.results.visualize import palette, save_file
from zsseg_rt.torch_files.clip_arrays import ClipTensors, describe_rows, describe_space
from zsseg_rt.training.class_embeddings import ClassEmbeddings, class_embeddings, region_embeddings
from zsseg_rt.training.config import LoopConfig, ModelConfig, TextConfig, TrainConfig
from zsseg_rt.training.data import (
    Augmentation,
    Batch,
    CenterCropAugmentation,
    EpochSampler,
    FitInsideAugmentation,
    ShortEdgeAugmentation,
    TrainingSamples,
    make_loader,
)
from zsseg_rt.training.data_checks import require_labels
from zsseg_rt.training.loop import is_run
from zsseg_rt.training.loop.checkpointing import CheckpointFolder
from zsseg_rt.training.loop.loop import BatchSource, TrainingResult, run_loop
from zsseg_rt.training.loop.reporting import NamedImage
from zsseg_rt.training.loop.run_state import seed_everything
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.tasks.cat_seg import class_prompts
from zsseg_rt.training.tasks.labelled import LabelledTask, TrainingTask
from zsseg_rt.training.tasks.zeroseg import TeacherFeatures, ZeroSegTask
from zsseg_rt.training.trained import (
    TOP_CLASS,
    TorchSegmenter,
    TrainedClasses,
    describe_model,
    export_trained,
    load_classes,
    load_trained,
)

_AUGMENTATIONS: Mapping[str, type[Any]] = {
    "fit_inside": FitInsideAugmentation,
    "short_edge": ShortEdgeAugmentation,
    "center_crop": CenterCropAugmentation,
}
_CLIP_OPTIONS = ("pretrained", "clip", "activation")
_CLIP_ARGUMENTS = {
    "source": "model.options.pretrained",
    "activation": "model.options.activation",
}
_TEACHER_ARGUMENTS = {
    "source": "task.options.teacher",
    "activation": "task.options.teacher_activation",
}
_FEATURE_OPTIONS = ("views", "cache_folder", "views_at_once")
BUNDLE, PICTURE = "demo.zsseg", "labelled.png"
_ROWS = 4
_log = logging.getLogger(__name__)


def build_augmentation(settings: Mapping[str, Any]) -> Augmentation:
    """Make an augmentation from its kind and fields."""
    fields = dict(settings)
    kind = fields.pop("kind", "fit_inside")
    check_choice("data.augmentation.kind", kind, _AUGMENTATIONS)
    augmentation: Augmentation = schema.decode(
        _AUGMENTATIONS[kind], fields, "data.augmentation", ArgumentError
    )
    return augmentation


def _with_crop_of(model: SegmentationModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An augmentation's settings; where "fit_inside" has no crop, it and its box fit the model."""
    fields, size_hw = dict(settings), model.crop_hw
    fits_inside = fields.get("kind", "fit_inside") == "fit_inside"
    if not fits_inside or "crop_hw" in fields or size_hw in (None, FitInsideAugmentation().crop_hw):
        return fields
    assert size_hw is not None
    side = min(size_hw)
    return {"scale": [4 * side, side]} | fields | {"crop_hw": list(size_hw)}


def build_model(config: ModelConfig, *, seen: Sequence[int], protocol: str) -> SegmentationModel:
    """Make the model to train: from a run, from an official checkpoint, or from CLIP."""
    start, options = config.start_from, dict(config.options)
    if start and is_run(start):
        if options:
            raise ArgumentError(
                f"model.options: expected none with the run {start} to start from, got "
                f"{', '.join(options)}. The run's model is taken as it is."
            )
        model = load_trained(start)
    elif start:
        model = _start_from_official(config.architecture, start, options)
    else:
        options = _checked_options(config.architecture, options, official=False)
        with arguments_called(_CLIP_ARGUMENTS, "model.options", options):
            model = create_model(config.architecture, **options)
    rows = () if protocol == "supervised" else tuple(seen)
    return model.with_seen(rows, self_trained=protocol == "transductive")


def _start_from_official(
    architecture: str, start: str, options: dict[str, Any]
) -> SegmentationModel:
    """A model from an official file; ``pretrained`` names CLIP if that is a file of its own."""
    takes_clip = "clip" in inspect.signature(find_builder(architecture, official=True)).parameters
    named = {name: options.pop(name) for name in _CLIP_OPTIONS if takes_clip and name in options}
    options = _checked_options(architecture, options, official=True)
    if named:
        options["clip"] = _load_named_clip(named)
    state_dict = normalize_state_dict(load_checkpoint(start))
    try:
        return from_official(architecture, state_dict, **options)
    except CheckpointError as error:
        if not takes_clip or named:
            raise
        raise CheckpointError(
            f"{start}: {error} In a configuration, model.options.pretrained is CLIP's file or "
            "open_clip tag ('openai'), and fusion = 'segments' does without."
        ) from error


def _load_named_clip(named: Mapping[str, Any]) -> ClipTensors:
    if "pretrained" not in named:
        raise ArgumentError(
            f"model.options.pretrained: expected CLIP's weights besides {', '.join(named)}, got "
            "none. Name a file or an open_clip tag, such as 'openai'."
        )
    with arguments_called(_CLIP_ARGUMENTS):
        return load_clip(
            named["pretrained"],
            architecture=named.get("clip", "ViT-B-16"),
            activation=named.get("activation"),
        )


def _build_task(
    kind: Any,
    config: TrainConfig,
    model: SegmentationModel,
    dataset: SegmentationDataset,
    class_embeds: Tensor,
) -> TrainingTask:
    """Make the objective of a model that learns from labels."""
    own: dict[str, Any] = {"seen": tuple(dataset.seen), "ignore_label": dataset.ignore_label}
    if "prompts" in (setting_names(kind) or ()):
        tower: Any = model.text_encoder
        outside = tower is None or config.text.bank or config.text.clip
        names, templates = dataset.class_names, config.text.templates
        own["prompts"] = None if outside else class_prompts(names, templates, tower)
    options = checked_settings(kind, config.task.options, "task.options", ("protocol", *own))
    own["protocol"] = config.task.protocol
    with arguments_called({"protocol": "task.protocol"}, "task.options", options):
        task: TrainingTask = kind(model, class_embeds, **own, **options)
    return task


def _build_zeroseg_task(config: TrainConfig, model: ZeroSeg, num_images: int) -> ZeroSegTask:
    """Make ZeroSeg's objective, which needs a teacher and no labels."""
    if config.task.protocol != "inductive":
        raise ArgumentError(
            f"task.protocol: expected 'inductive', because ZeroSeg uses no labels, got "
            f"{config.task.protocol!r}. Leave it out."
        )
    options = dict(config.task.options)
    weights = _load_teacher(options, config.model.options)
    features = {name: options.pop(name) for name in _FEATURE_OPTIONS if name in options}
    options = checked_settings(ZeroSegTask, options, "task.options", ("batch_size",))
    features = typed_settings(TeacherFeatures, features, "task.options")
    teacher = TeacherFeatures(build_image_encoder(weights), num_images=num_images, **features)
    return ZeroSegTask(model, teacher, batch_size=config.loop.batch_size, **options)


def _load_teacher(options: dict[str, Any], student: Mapping[str, Any]) -> ClipTensors:
    """The teacher that options name, which are removed; otherwise the student's CLIP."""
    named = {
        "source": options.pop("teacher", ""),
        "architecture": options.pop("teacher_architecture", "ViT-L-14"),
        "activation": options.pop("teacher_activation", None),
    }
    called = _TEACHER_ARGUMENTS
    if not named["source"] and student.get("pretrained"):
        called = _CLIP_ARGUMENTS
        names = {"pretrained": "source", "clip": "architecture", "activation": "activation"}
        named |= {new: student[old] for old, new in names.items() if old in student}
    if not named["source"]:
        raise ArgumentError(
            "task.options.teacher: expected CLIP weights, a file or an open_clip tag, got none. "
            "ZeroSeg learns from a CLIP image encoder."
        )
    with arguments_called(called):
        return load_clip(named.pop("source"), **named)


def batch_source(samples: TrainingSamples, config: LoopConfig) -> BatchSource:
    """Training batches by position, loaded by worker processes."""

    def source(
        *, start_position: int, process_index: int, num_processes: int, batch_size: int
    ) -> Iterator[Batch]:
        sampler = EpochSampler(
            len(samples.dataset),
            config.seed,
            batch_size=batch_size * num_processes,
            start_position=start_position,
            process_index=process_index,
            num_processes=num_processes,
        )
        pinned = config.device != "cpu" and torch.cuda.is_available()
        return make_loader(samples, sampler, num_workers=config.num_workers, pin_memory=pinned)

    return source


def _checked_options(
    architecture: str, options: Mapping[str, Any], *, official: bool
) -> dict[str, Any]:
    function = find_builder(architecture, official=official)
    hidden = ("state_dict", "seen_classes", "self_trained", *(("clip",) if official else ()))
    return checked_settings(function, options, "model.options", hidden)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything that a run needs, built and checked."""

    config: TrainConfig  # What it was built from
    dataset: SegmentationDataset  # The training data
    # The data checkpoints are evaluated on; None does not evaluate
    evaluation_dataset: SegmentationDataset | None
    task: TrainingTask  # Model and objective
    # Class embeddings; None for a ZeroSeg without text, which learns without any
    embeddings: ClassEmbeddings | None
    batches: BatchSource  # Training batches

    @cached_property
    def classes(self) -> TrainedClasses | None:
        """The facts about classes that are saved with the model."""
        if self.embeddings is None:
            return None
        config, dataset = self.config, self.dataset
        space = text_space(config.text, config.model)
        if self.task.tunes_text and not config.text.space:
            space = f"CAT-Seg trained on {dataset.name} (its own text tower)"
        return TrainedClasses(
            names=tuple(dataset.class_names),
            seen=tuple(dataset.seen),
            templates=config.text.templates,
            region_templates=config.text.region_templates,
            space=space,
            phrases=self.embeddings.phrases,
            dataset=dataset.name,
            protocol=config.task.protocol,
        )

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
        """Tensors of a checkpoint besides weights: embeddings of every synonym, if there are."""
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

    def preview(self, model: nn.Module, count: int) -> list[NamedImage]:
        """Images of what a model predicts: photo, truth and prediction side by side."""
        dataset, segmenter = self.evaluation_dataset or self.dataset, self.segmenter(model)
        colours = palette(dataset.class_names)
        count = min(count, len(dataset))
        samples = [dataset[index * len(dataset) // count] for index in range(count)]
        return [(s.name, side_by_side(s, segmenter.segment(s.image), colours)) for s in samples]


def train(config: TrainConfig, *, resume: bool = False) -> TrainingResult:
    """Train as a configuration says.

    Started by torchrun or ``accelerate launch``, all processes train together.
    """
    return train_assembled(assemble(config), resume=resume)


def train_assembled(parts: Assembly, *, resume: bool = False) -> TrainingResult:
    """Train what :func:`assemble` built; see :func:`train`. The task holds the last weights."""
    config, folder = parts.config, Path(parts.config.output.folder)
    _keep_config(config, folder, resume)
    judged = parts.evaluation_dataset is not None
    with arguments_called({"run_folder": "output.folder"}):
        return run_loop(
            parts.task,
            parts.batches,
            config=config.loop,
            run_folder=folder,
            optimizer=config.optimizer,
            schedule=lambda step: config.schedule.factor(step, config.loop.iterations),
            evaluate=parts.evaluate if judged else None,
            preview=parts.preview if judged else None,
            model_card=describe_model(parts.task.model, parts.classes),
            constants=parts.constants,
            resume=resume,
        )


def assemble(config: TrainConfig, *, dataset: SegmentationDataset | None = None) -> Assembly:
    """Build and check everything a run needs; nothing is trained or written."""
    seed_everything(config.loop.seed)
    if dataset is None:
        dataset = config.open_data("training")
    if not len(dataset):
        raise DatasetError(f"data: expected images, got none in {dataset.name}. Check data.split.")
    judged = config.open_data("evaluation") if config.evaluation.split else None
    if judged is not None and tuple(judged.class_names) != tuple(dataset.class_names):
        raise ArgumentError(
            f"evaluation.split: expected the {len(dataset.class_names)} classes of "
            f"{dataset.name}, got {len(judged.class_names)} others in {judged.name}. "
            "Give both splits the same classes."
        )
    if len(dataset.seen) == len(dataset.class_names) and config.loop.best_metric == "hIoU":
        _log.info("loop.best_metric: mIoU, because no class of %s is unseen", dataset.name)
        config = replace(config, loop=replace(config.loop, best_metric="mIoU"))
    if judged is not None:
        check_choice("loop.best_metric", config.loop.best_metric, FIGURES)
    build_augmentation(config.data.augmentation)  # refuse bad settings before weights are read
    model = build_model(config.model, seen=dataset.seen, protocol=config.task.protocol)
    settings = _with_crop_of(model, config.data.augmentation)
    config = replace(config, data=replace(config.data, augmentation=settings))
    embeddings, task = _build_objective(config, model, dataset)
    samples = TrainingSamples(dataset, build_augmentation(settings), config.loop.seed)
    batches = batch_source(samples, config.loop)
    if isinstance(task, LabelledTask):
        batches = require_labels(batches, task.label_protocol, dataset)
    return Assembly(
        config=config,
        dataset=dataset,
        evaluation_dataset=judged,
        task=task,
        embeddings=embeddings,
        batches=batches,
    )


def _build_objective(
    config: TrainConfig, model: SegmentationModel, dataset: SegmentationDataset
) -> tuple[ClassEmbeddings | None, TrainingTask]:
    if model.architecture not in TASKS:
        raise ArgumentError(
            f"model.architecture: expected one that is trained ({', '.join(TASKS)}), got "
            f"{model.architecture!r}. Choose another."
        )
    kind = TASKS[model.architecture]
    if kind.needs_labels:
        if not dataset.class_names:
            raise ArgumentError(
                f"data.name: expected a data set with classes, which {config.model.architecture} "
                f"needs, got {config.data.name!r}. Name another, or train ZeroSeg."
            )
        embeddings = class_embeddings(dataset.class_names, config.text, model)
        return embeddings, _build_task(kind, config, model, dataset, embeddings.class_embeds)
    has_text = bool(config.text.bank or config.text.clip) or model.text_encoder is not None
    has_text = has_text and bool(dataset.class_names)
    if config.evaluation.split and not has_text:
        raise ArgumentError(
            f"evaluation.split: expected none, because ZeroSeg trains without classes and nothing "
            f"embeds them, got {config.evaluation.split!r}. Set it to '', or give data with "
            "classes and the teacher's text tower as model.options.pretrained."
        )
    task = _build_zeroseg_task(config, cast(ZeroSeg, model), len(dataset))
    names = dataset.class_names
    return class_embeddings(names, config.text, model) if has_text else None, task


def _keep_config(config: TrainConfig, folder: Path, resume: bool) -> None:
    """Save the resolved configuration; a resumed run must have the same one."""
    if int(os.environ.get("RANK", "0")) != 0:  # set by the launcher: the main process does it
        return
    path = folder / "config.toml"
    started = bool(CheckpointFolder(folder / "checkpoints").steps())
    if started and not resume:
        return  # the loop refuses to overwrite it
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
    """Name the joint space: as configured, or after where the class embeddings come from."""
    if text.space:
        return text.space
    if text.bank:
        return describe_rows(text.bank)
    if text.clip:
        return describe_space(text.clip, text.clip_architecture)
    if model.start_from and is_run(model.start_from):
        trained = load_classes(model.start_from)
        return "" if trained is None else trained[0].space
    source = model.options.get("pretrained") or model.start_from
    builder: Any = find_builder(model.architecture, official=False)
    default = inspect.signature(builder).parameters["clip"].default
    return describe_space(source, str(model.options.get("clip", default))) if source else ""


def train_and_show(
    config: TrainConfig, *, resume: bool = False
) -> tuple[TrainingResult, Path, Path]:
    """Train as a configuration says, export the best checkpoint and draw what it labels."""
    parts, folder = assemble(config), Path(config.output.folder)
    result = train_assembled(parts, resume=resume)
    if result.finished:
        export_trained(folder, folder / BUNDLE, precisions=("float32",), overwrite=True)
        rows = [image for _, image in parts.preview(load_trained(folder), _ROWS)]
        doubled = np.concatenate(rows, axis=0).repeat(2, axis=0).repeat(2, axis=1)
        save_file(folder / PICTURE, cv2.imencode(".png", doubled[..., ::-1])[1].tobytes())
    return result, folder / BUNDLE, folder / PICTURE
