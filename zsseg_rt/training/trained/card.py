"""The result of a run: load its model again, with the classes it was trained for.

A checkpoint's ``model_card`` is a *card*: ``architecture``, ``config`` (the model's, as plain
data), ``text_encoder`` (sizes of a text tower that the config does not mention) and ``classes``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zsseg_rt.common import schema
from zsseg_rt.common.checks import current_name
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.exporters import export_bundle
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.clip.towers import TextEncoder, TextEncoderConfig
from zsseg_rt.models.registry import ARCHITECTURES
from zsseg_rt.text.class_names import ClassList, split_synonyms
from zsseg_rt.torch_files.checkpoints import load_weights
from zsseg_rt.training.class_embeddings import region_embeddings
from zsseg_rt.training.loop import checkpoint_file
from zsseg_rt.training.loop.checkpointing import CheckpointFolder, read_checkpoint, refuse_old
from zsseg_rt.training.loop.reporting import EvaluationLog

_log = logging.getLogger(__name__)

TOP_CLASS = "top class"
"""Figure of an evaluation: how many percent of the annotated pixels got the commonest label."""
_NEARLY_ALL = 98.0  # percent of the evaluation's pixels


@dataclass(frozen=True, kw_only=True)
class TrainedClasses:
    """The vocabulary a model was trained for."""

    names: tuple[str, ...]  # The data set's classes in order; commas separate synonyms
    seen: tuple[int, ...]  # Indices of the seen ones
    templates: tuple[str, ...]  # Prompts around names
    space: str  # Name of the joint space
    phrases: tuple[str, ...]  # Phrases that have embeddings, in the order of the checkpoint's rows
    dataset: str = ""  # The data set that it was trained on
    protocol: str = ""  # What training knew about unseen classes
    # Prompts around the names that ZegFormer's regions are compared with; if empty, the official
    # ones
    region_templates: tuple[str, ...] = ()

    @property
    def seen_phrases(self) -> tuple[str, ...]:
        """Every synonym of the seen classes."""
        groups = split_synonyms([self.names[index] for index in self.seen])
        return ClassList.of_groups(groups).phrases

    @property
    def lowered_phrases(self) -> tuple[str, ...]:
        """Those whose scores are lowered, if training treated some classes as unseen."""
        all_seen = self.protocol == "supervised" or len(self.seen) == len(self.names)
        return () if all_seen else self.seen_phrases


def describe_model(model: nn.Module, classes: TrainedClasses | None = None) -> dict[str, Any]:
    """Make a model's card."""
    architecture: Any = getattr(model, "architecture", None)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"model: expected one of {', '.join(ARCHITECTURES)}, got {type(model).__name__}. "
            "Save its state_dict yourself."
        )
    model_config: Any = model.config
    text_encoder = getattr(model, "text_encoder", None)
    text_config: Any = None if text_encoder is None else text_encoder.config
    return {
        "architecture": architecture,
        "config": schema.encode(model_config),
        "text_encoder": schema.encode(text_config),
        "classes": schema.encode(classes),
    }


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a path refers to: itself, or a run's best, or else its last."""
    path = checkpoint_file(path)
    if path.is_file():
        return path
    if (path / "state.json").is_file():
        refuse_old(path)
    folder = CheckpointFolder(path / "checkpoints")
    steps = folder.steps()
    if not steps:
        raise CheckpointError(
            f"{path}: expected a training run or one of its checkpoints, got "
            f"{'a folder without one' if path.is_dir() else 'no folder'}. Check the path."
        )
    best = EvaluationLog.read(path).best_step
    return folder.at(steps[-1] if best not in steps or best is None else best)


def load_trained(path: str | Path) -> SegmentationModel:
    """Load the model of a run, on the CPU, in evaluation mode."""
    file = find_checkpoint(path)
    folder = file.resolve().parent
    calibration = folder.parent / "calibration.json"
    if folder.name == "checkpoints" and calibration.is_file():  # masks blended with cosines
        raise CheckpointError(
            f"{calibration}: expected no such file, as calibrate is retired, got one. Remove it: "
            "the run's masks alone label."
        )
    checkpoint, where = read_checkpoint(file, mmap=True), f"{file}: model_card"
    card = checkpoint.model_card
    architecture = current_name(str(card.get("architecture")))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: expected one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r}. Use the version of zsseg_rt that wrote it."
        )
    known, tower = ARCHITECTURES[architecture], card.get("text_encoder")
    config = schema.decode(known.config, card.get("config"), where, CheckpointError)
    with torch.device("meta"):
        model = known.model(config)
        if getattr(model, "text_encoder", None) is None and tower is not None:
            where = f"{where}.text_encoder"
            sizes = schema.decode(TextEncoderConfig, tower, where, CheckpointError)
            model.text_encoder = TextEncoder(sizes)
    load_weights(model, checkpoint.model, architecture=architecture)
    return model.eval()


def load_classes(path: str | Path) -> tuple[TrainedClasses, Tensor] | None:
    """The classes that a run's model was trained for; None if the run did not say.

    Returns:
        The classes, and the embeddings of their phrases, float32 ``[P, D]``.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file, mmap=True)
    raw = checkpoint.model_card.get("classes")
    if raw is None:
        return None
    classes = schema.decode(TrainedClasses, raw, f"{file}: model_card", CheckpointError)
    embeds = checkpoint.constants.get("text_embeds")
    if embeds is None or len(embeds) != len(classes.phrases):
        raise CheckpointError(
            f"{file}: expected text_embeds of {len(classes.phrases)} phrases in constants, got "
            f"{'none' if embeds is None else len(embeds)}. "
            "Copy the checkpoint again, or take an earlier one."
        )
    return classes, embeds


def export_trained(run: str | Path, path: str | Path, **options: Any) -> Path:
    """Write the model of a training run as a bundle.

    The bundle knows the classes of the training data by their embeddings (its text bank), so that
    it needs no text encoder for them, and lowers the scores of the seen ones as training specified.
    A warning tells if the checkpoint gave nearly all pixels of its evaluation to one class.
    """
    model, known = load_trained(run), load_classes(run)
    file = find_checkpoint(run)
    settings: dict[str, Any] = {
        "source": f"trained by zsseg_rt, {file.name}",
        "space": "",
        "size_hw": model.size_hw,
    }
    if known is not None:
        classes, embeds = known
        lowered = set(classes.lowered_phrases)
        rows = [index for index, phrase in enumerate(classes.phrases) if phrase in lowered]
        model = model.with_seen(rows, self_trained=classes.protocol == "transductive")
        if model.text_space:
            model.text_space = classes.space
        bank = embeds.numpy()
        regions = region_embeddings(model, classes.names, classes.region_templates)
        if regions is not None:
            bank = np.stack([bank, regions.numpy()])
            settings["region_templates"] = classes.region_templates or model.region_templates
        settings |= {
            "class_names": classes.phrases,
            "templates": classes.templates,
            "space": classes.space,
            "text_bank": (classes.phrases, bank),
        }
    written = export_bundle(model, path, **settings | options)
    share = _share_of_top_class(file.resolve())
    if share is not None and share >= _NEARLY_ALL:
        _log.warning(
            "%s: gives one class %.1f %% of the pixels of its evaluation. It has learned nothing "
            "useful unless the images show little else: train longer, from a better start, or "
            "look at the run's pictures.",
            file,
            share,
        )
    return written


def _share_of_top_class(file: Path) -> float | None:
    """How many percent of an evaluation's pixels a checkpoint gave to one class, if known."""
    step = file.stem.removeprefix("step-")
    if file.parent.name != "checkpoints" or not step.isdecimal():
        return None  # a copy outside its run
    return EvaluationLog.read(file.parents[1]).of(int(step)).get(TOP_CLASS)
