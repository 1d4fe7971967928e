"""What a run leaves: load its model again, with the classes it was trained for.

A checkpoint's ``model.json`` is a *card*: ``architecture``, ``config`` (the model's, as plain
data), ``text_encoder`` (sizes of a text tower that the config does not mention) and ``classes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt import schema
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models.checkpoints import load_weights
from zsseg_rt.models.clip_rc import ClipRC, ClipRCConfig
from zsseg_rt.models.dense_baseline import DenseBaseline, DenseBaselineConfig
from zsseg_rt.models.dense_clip import DenseCLIP, DenseCLIPConfig
from zsseg_rt.models.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.models.zegclip import ZegCLIP, ZegCLIPConfig
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zegformer_config import ZegFormerConfig
from zsseg_rt.models.zeroseg import ZeroSeg, ZeroSegConfig
from zsseg_rt.training.checkpointing import (
    MODEL_CARD,
    STATE_FILE,
    CheckpointFolder,
    read_json,
    read_tensors,
)
from zsseg_rt.training.class_phrases import split_synonyms
from zsseg_rt.training.evaluations import EvaluationLog

__all__ = ["TrainedClasses", "describe_model", "find_checkpoint", "load_classes"]
__all__ += ["load_trained", "with_seen_classes"]

_FAMILIES: Mapping[str, tuple[type[nn.Module], type[Any]]] = {
    "clip_rc": (ClipRC, ClipRCConfig),
    "dense_baseline": (DenseBaseline, DenseBaselineConfig),
    "dense_clip": (DenseCLIP, DenseCLIPConfig),
    "zegclip": (ZegCLIP, ZegCLIPConfig),
    "zegformer": (ZegFormer, ZegFormerConfig),
    "zeroseg": (ZeroSeg, ZeroSegConfig),
}


@dataclass(frozen=True, kw_only=True)
class TrainedClasses:
    """The vocabulary a model was trained for.

    Attributes:
        names: The data set's classes in order; commas separate synonyms.
        seen: Indices of the seen ones.
        templates: Prompts around names.
        space: Name of the joint space.
        region_templates: Prompts of ZegFormer's second look; empty is the official ones.
        phrases: Phrases that have embeddings, in the order of the checkpoint's rows.
        dataset: What was trained on.
        protocol: What training knew of unseen classes.
    """

    names: tuple[str, ...]
    seen: tuple[int, ...]
    templates: tuple[str, ...]
    space: str
    phrases: tuple[str, ...]
    dataset: str = ""
    protocol: str = ""
    region_templates: tuple[str, ...] = ()

    @property
    def seen_phrases(self) -> tuple[str, ...]:
        """Every synonym of the seen classes."""
        seen = split_synonyms([self.names[index] for index in self.seen])
        return tuple(phrase for synonyms in seen for phrase in synonyms)

    @property
    def counts_as_unseen(self) -> bool:
        """Whether training treated some classes as unseen."""
        return self.protocol != "supervised" and len(self.seen) < len(self.names)


def describe_model(model: nn.Module, classes: TrainedClasses | None = None) -> dict[str, Any]:
    """Make a model's card.

    Raises:
        CheckpointError: The model is of no family that can be built again.
    """
    names = {family: name for name, (family, _) in _FAMILIES.items()}
    if type(model) not in names:
        raise CheckpointError(
            f"model: expected one of {', '.join(_FAMILIES)}, got {type(model).__name__}. "
            "Save its state_dict yourself."
        )
    model_config: Any = model.config
    text_encoder = getattr(model, "text_encoder", None)
    text_config: Any = None if text_encoder is None else text_encoder.config
    return {
        "architecture": names[type(model)],
        "config": schema.encode(model_config),
        "text_encoder": schema.encode(text_config),
        "classes": schema.encode(classes),
    }


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or a run's best, or without one its last.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if (path / STATE_FILE).is_file():
        return path
    folder = CheckpointFolder(path / "checkpoints")
    steps = folder.steps()
    if not steps:
        raise CheckpointError(
            f"{path}: expected a training run or one of its checkpoints, got "
            f"{'a folder without one' if path.is_dir() else 'no folder'}. Check the path."
        )
    best = EvaluationLog.read(path).best_step
    return folder.at(steps[-1] if best not in steps or best is None else best)


def load_trained(path: str | Path) -> nn.Module:
    """Load the model of a run.

    Args:
        path: A run's folder, whose best checkpoint is taken (the last one if none was evaluated),
            or a checkpoint's.

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged or of an unknown architecture.
    """
    folder = find_checkpoint(path)
    card = read_json(folder / MODEL_CARD)
    architecture = str(card.get("architecture"))
    if architecture not in _FAMILIES:
        raise CheckpointError(
            f"{folder / MODEL_CARD}: expected one of {', '.join(_FAMILIES)}, got "
            f"{architecture!r}. Use the version of zsseg_rt that wrote it."
        )
    family, config_type = _FAMILIES[architecture]
    config = schema.decode(
        config_type, card.get("config"), str(folder / MODEL_CARD), CheckpointError
    )
    with torch.device("meta"):
        model = family(config)
        if getattr(model, "text_encoder", None) is None and card.get("text_encoder") is not None:
            model.text_encoder = _text_encoder(card["text_encoder"], folder)
    load_weights(model, read_tensors(folder, "model"), architecture=architecture)
    return model.eval()


def load_classes(path: str | Path) -> tuple[TrainedClasses, Tensor] | None:
    """The classes that a run's model was trained for; None if the run did not say.

    Args:
        path: As for :func:`load_trained`.

    Returns:
        The classes, and the embeddings of their phrases, float32 ``[P, D]``.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    folder = find_checkpoint(path)
    raw = read_json(folder / MODEL_CARD).get("classes")
    if raw is None:
        return None
    classes = schema.decode(TrainedClasses, raw, str(folder / MODEL_CARD), CheckpointError)
    embeds = read_tensors(folder, "constants").get("text_embeds")
    if embeds is None or len(embeds) != len(classes.phrases):
        raise CheckpointError(
            f"{folder}: expected text_embeds of {len(classes.phrases)} phrases in "
            f"constants.safetensors, got {'none' if embeds is None else len(embeds)}. "
            "Copy the checkpoint again, or take an earlier one."
        )
    return classes, embeds


def with_seen_classes(model: nn.Module, seen: Sequence[int], *, self_trained: bool) -> nn.Module:
    """Tell a model which classes training sees, where its family has such a rule.

    Returns:
        The same model.
    """
    config: Any = model.config
    known = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {"seen_classes": tuple(seen), "self_trained": self_trained}
    changes = {name: value for name, value in changes.items() if name in known}
    model.config = dataclasses.replace(config, **changes)
    return model


def _text_encoder(raw: Any, folder: Path) -> TextEncoder:
    where = f"{folder / MODEL_CARD}: text_encoder"
    return TextEncoder(schema.decode(TextEncoderConfig, raw, where, CheckpointError))
