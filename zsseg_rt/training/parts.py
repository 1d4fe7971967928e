"""Build the parts of a run from the tables of its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from zsseg_rt.common import schema
from zsseg_rt.common.checks import arguments_called, check_choice
from zsseg_rt.common.schema import checked_settings, setting_names, typed_settings
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.models import create_model, from_official, load_checkpoint, normalize_state_dict
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.clip.weights import build_image_encoder
from zsseg_rt.models.registry import ARCHITECTURES, find_builder
from zsseg_rt.models.zeroseg.model import ZeroSeg
from zsseg_rt.torch_files.clip_weights import ClipWeights, load_clip
from zsseg_rt.training.config import ModelConfig, TaskConfig, TextConfig
from zsseg_rt.training.data.loading import Batch, EpochSampler, TrainingSamples, make_loader
from zsseg_rt.training.data.transforms import (
    Augmentation,
    CenterCropAugmentation,
    FitInsideAugmentation,
    ShortEdgeAugmentation,
)
from zsseg_rt.training.loop import is_run
from zsseg_rt.training.loop.config import LoopConfig
from zsseg_rt.training.loop.loop import BatchSource
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.tasks.cat_seg import class_prompts
from zsseg_rt.training.tasks.labelled import TrainingTask
from zsseg_rt.training.tasks.zeroseg import ZeroSegTask
from zsseg_rt.training.tasks.zeroseg_features import TeacherFeatures
from zsseg_rt.training.trained.card import load_trained

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
_TEACHER_SUFFIXES = {"source": "", "activation": "_activation"}
_FEATURE_OPTIONS = ("views", "cache_folder", "views_at_once")


def build_augmentation(settings: Mapping[str, Any]) -> Augmentation:
    """Make an augmentation from its kind and fields."""
    fields = dict(settings)
    kind = fields.pop("kind", "fit_inside")
    check_choice("data.augmentation.kind", kind, _AUGMENTATIONS)
    augmentation: Augmentation = schema.decode(
        _AUGMENTATIONS[kind], fields, "data.augmentation", ArgumentError
    )
    return augmentation


def with_crop_of(model: SegmentationModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An augmentation's settings; if they set no crop size, it is the model's input size.

    Only for ``"fit_inside"``, whose own default is the 512 pixels of the published models. The box
    that images are fitted into scales in proportion.
    """
    fields, size_hw = dict(settings), model.crop_hw
    known = fields.get("kind", "fit_inside") == "fit_inside" and "crop_hw" not in fields
    if not known or size_hw in (None, FitInsideAugmentation().crop_hw):
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


def _load_named_clip(named: Mapping[str, Any]) -> ClipWeights:
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


def find_task(architecture: str) -> type[TrainingTask]:
    """The objective of an architecture."""
    if architecture not in TASKS:
        raise ArgumentError(
            f"model.architecture: expected one that is trained ({', '.join(TASKS)}), got "
            f"{architecture!r}. Choose another."
        )
    return TASKS[architecture]


def build_task(
    config: TaskConfig,
    model: SegmentationModel,
    class_embeds: Tensor,
    dataset: SegmentationDataset,
    text: TextConfig,
) -> TrainingTask:
    """Make the objective of a model that learns from labels."""
    kind: Any = find_task(model.architecture)
    own: dict[str, Any] = {"seen": tuple(dataset.seen), "ignore_label": dataset.ignore_label}
    if "prompts" in (setting_names(kind) or ()):
        tower: Any = model.text_encoder
        outside = tower is None or text.bank or text.clip
        names, templates = dataset.class_names, text.templates
        own["prompts"] = None if outside else class_prompts(names, templates, tower)
    options = checked_settings(kind, config.options, "task.options", ("protocol", *own))
    with arguments_called({"protocol": "task.protocol"}, "task.options", options):
        task: TrainingTask = kind(model, class_embeds, protocol=config.protocol, **own, **options)
    return task


def build_zeroseg_task(
    config: TaskConfig,
    student: ModelConfig,
    model: SegmentationModel,
    batch_size: int,
    *,
    num_images: int,
) -> ZeroSegTask:
    """Make ZeroSeg's objective, which needs a teacher and no labels."""
    if config.protocol != "inductive":
        raise ArgumentError(
            f"task.protocol: expected 'inductive', because ZeroSeg uses no labels, got "
            f"{config.protocol!r}. Leave it out."
        )
    options = dict(config.options)
    weights = _load_teacher(options, student.options)
    features = {name: options.pop(name) for name in _FEATURE_OPTIONS if name in options}
    options = checked_settings(ZeroSegTask, options, "task.options", ("batch_size",))
    made = typed_settings(TeacherFeatures, features, "task.options")
    teacher = TeacherFeatures(build_image_encoder(weights), num_images=num_images, **made)
    return ZeroSegTask(cast(ZeroSeg, model), teacher, batch_size=batch_size, **options)


def _load_teacher(options: dict[str, Any], student: Mapping[str, Any]) -> ClipWeights:
    """The teacher that options name, which are removed; otherwise the student's CLIP."""
    named = {
        "source": options.pop("teacher", ""),
        "architecture": options.pop("teacher_architecture", "ViT-L-14"),
        "activation": options.pop("teacher_activation", None),
    }
    called = {name: f"task.options.teacher{suffix}" for name, suffix in _TEACHER_SUFFIXES.items()}
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
        length = len(samples.dataset)
        step_size = batch_size * num_processes
        sampler = EpochSampler(
            length,
            config.seed,
            batch_size=step_size,
            start_position=start_position,
            process_index=process_index,
            num_processes=num_processes,
            drop_last=length >= step_size,
        )
        pinned = config.device != "cpu" and torch.cuda.is_available()
        return make_loader(samples, sampler, num_workers=config.num_workers, pin_memory=pinned)

    return source


def _checked_options(
    architecture: str, options: Mapping[str, Any], *, official: bool
) -> dict[str, Any]:
    function = find_builder(architecture, official=official)
    if not official:
        options = schema.up_to_date(ARCHITECTURES[architecture].config, options)
    hidden = ("state_dict", "seen_classes", "self_trained", *(("clip",) if official else ()))
    return checked_settings(function, options, "model.options", hidden)
