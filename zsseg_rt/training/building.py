"""Build the parts of a run from their tables of a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt import schema
from zsseg_rt.argument_names import arguments_called
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models import create_model, from_official, load_checkpoint, normalize_state_dict
from zsseg_rt.models.clip import ClipWeights, build_image_encoder, load_clip
from zsseg_rt.models.clip_rc import ClipRC
from zsseg_rt.models.dense_baseline import DenseBaseline
from zsseg_rt.models.descriptor_model import DescriptorModel
from zsseg_rt.models.registry import find_builder
from zsseg_rt.models.zegclip import ZegCLIP
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zeroseg import ZeroSeg
from zsseg_rt.training.config import DataConfig, ModelConfig, TaskConfig
from zsseg_rt.training.datasets import SegmentationDataset, create_dataset
from zsseg_rt.training.loading import EpochSampler, TrainingSamples, make_loader
from zsseg_rt.training.loop import BatchSource
from zsseg_rt.training.loop_config import LoopConfig
from zsseg_rt.training.settings import checked_settings, typed_settings
from zsseg_rt.training.task import Batch, TrainingTask
from zsseg_rt.training.tasks.dense import DenseTask
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.tasks.zegformer import ZegFormerTask
from zsseg_rt.training.tasks.zeroseg import ZeroSegTask
from zsseg_rt.training.trained import load_trained, with_seen_classes
from zsseg_rt.training.transforms import (
    Augmentation,
    CenterCropAugmentation,
    FitInsideAugmentation,
    ShortEdgeAugmentation,
)
from zsseg_rt.training.zeroseg_features import TeacherFeatures

__all__ = ["batch_source", "build_augmentation", "build_model", "build_task"]
__all__ += ["build_zeroseg_task", "open_split", "with_crop_of"]

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
_FEATURE_OPTIONS = ("views", "cache_folder", "from_original", "views_at_once")
_TASKS: Mapping[type[nn.Module], type[TrainingTask]] = {
    ClipRC: DescriptorTask,
    DenseBaseline: DenseTask,
    ZegCLIP: DescriptorTask,
    ZegFormer: ZegFormerTask,
}


def open_split(config: DataConfig, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    """Open a split of the data set that a configuration names.

    Raises:
        ArgumentError: The name or an option is unknown.
        DatasetError: The data is absent or incomplete.
    """
    return create_dataset(config.name, config.root or None, split, **options)


def build_augmentation(settings: Mapping[str, Any]) -> Augmentation:
    """Make an augmentation from its kind and fields.

    Raises:
        ArgumentError: A setting is unknown or out of its range.
    """
    fields = dict(settings)
    kind = fields.pop("kind", "fit_inside")
    if kind not in _AUGMENTATIONS:
        raise ArgumentError(
            f"data.augmentation.kind: expected one of {', '.join(_AUGMENTATIONS)}, got {kind!r}. "
            "Check the spelling."
        )
    augmentation: Augmentation = schema.decode(
        _AUGMENTATIONS[kind], fields, "data.augmentation", ArgumentError
    )
    return augmentation


def with_crop_of(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An augmentation's settings; crops that they leave open get the model's input size.

    Only for ``"fit_inside"``, whose own default is the 512 pixels of the published models. The box
    that pictures are fitted in follows in proportion.

    Args:
        model: With an input size of its own (ZegCLIP, CLIP-RC, the dense baseline), or any other.
        settings: ``kind`` and fields.
    """
    fields, size_hw = dict(settings), _own_size_hw(model)
    known = fields.get("kind", "fit_inside") == "fit_inside" and "crop_hw" not in fields
    if not known or size_hw in (None, FitInsideAugmentation().crop_hw):
        return fields
    assert size_hw is not None
    side = min(size_hw)
    return {"scale": [4 * side, side]} | fields | {"crop_hw": list(size_hw)}


def _own_size_hw(model: nn.Module) -> tuple[int, int] | None:
    if isinstance(model, DescriptorModel):
        return model.config.image_size, model.config.image_size
    return model.config.size_hw if isinstance(model, DenseBaseline) else None


def build_model(config: ModelConfig, *, seen: Sequence[int], protocol: str) -> nn.Module:
    """Make the model to train: from a run, from an official checkpoint, or from CLIP.

    Args:
        config: Which, and from what.
        seen: Indices of the seen classes; in the supervised protocol no class counts as unseen.
        protocol: Of the task.

    Raises:
        ArgumentError: An option is not the architecture's.
        CheckpointError: Weights cannot be read, or CLIP's are needed and not there.
    """
    start, options = config.start_from, dict(config.options)
    if start and Path(start).is_dir():
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
    return with_seen_classes(model, rows, self_trained=protocol == "transductive")


def _start_from_official(architecture: str, start: str, options: dict[str, Any]) -> nn.Module:
    """A model of an official file; CLIP, where that is a file of its own, as ``pretrained``."""
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
            "open_clip tag ('openai'), and ensemble = false does without."
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


def build_task(
    config: TaskConfig, model: nn.Module, class_embeds: Tensor, dataset: SegmentationDataset
) -> TrainingTask:
    """Make the objective of a model's family.

    Raises:
        ArgumentError: There is none, or a setting is wrong.
    """
    kind: Any = _TASKS.get(type(model))
    if kind is None:
        raise ArgumentError(
            f"model.architecture: expected one with a task for labelled pictures "
            f"({', '.join(family.__name__ for family in _TASKS)}), got {type(model).__name__}. "
            "Choose another."
        )
    own = {"seen": tuple(dataset.seen), "ignore_label": dataset.ignore_label}
    options = checked_settings(kind, config.options, "task.options", ("protocol", *own))
    with arguments_called({"protocol": "task.protocol"}, "task.options", options):
        task: TrainingTask = kind(model, class_embeds, protocol=config.protocol, **own, **options)
    return task


def build_zeroseg_task(
    config: TaskConfig, student: ModelConfig, model: ZeroSeg, batch_size: int
) -> ZeroSegTask:
    """Make ZeroSeg's objective, which needs a teacher and no labels.

    Args:
        config: ``options.teacher`` is a CLIP file or open_clip tag, ``teacher_architecture``
            open_clip's name for a tag and ``teacher_activation`` for a file that does not say;
            ``views`` and ``cache_folder`` are those of
            :class:`zsseg_rt.training.zeroseg_features.TeacherFeatures`; the rest are the task's.
        student: Without a teacher, its ``options.pretrained`` is the teacher: the CLIP whose text
            tower embeds class names.
        model: The student.
        batch_size: Pictures of one optimizer step.

    Raises:
        ArgumentError: A setting is wrong.
        CheckpointError: The teacher cannot be read.
    """
    if config.protocol != "inductive":
        raise ArgumentError(
            f"task.protocol: expected 'inductive', because ZeroSeg looks at no labels, got "
            f"{config.protocol!r}. Leave it out."
        )
    options = dict(config.options)
    weights = _load_teacher(options, student.options)
    features = {name: options.pop(name) for name in _FEATURE_OPTIONS if name in options}
    options = checked_settings(ZeroSegTask, options, "task.options", ("batch_size",))
    made = typed_settings(TeacherFeatures, features, "task.options")
    teacher = TeacherFeatures(build_image_encoder(weights), **made)
    return ZeroSegTask(model, teacher, batch_size=batch_size, **options)


def _load_teacher(options: dict[str, Any], student: Mapping[str, Any]) -> ClipWeights:
    """The teacher that options name, which are taken out of them; else the student's CLIP."""
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
        loader = make_loader(samples, sampler, num_workers=config.num_workers, pin_memory=pinned)
        return iter(loader)

    return source


def _checked_options(
    architecture: str, options: Mapping[str, Any], *, official: bool
) -> dict[str, Any]:
    function = find_builder(architecture, official=official)
    hidden = ("state_dict", "seen_classes", "self_trained", *(("clip",) if official else ()))
    return checked_settings(function, options, "model.options", hidden)
