"""What a run calls the space of its class embeddings."""

from __future__ import annotations

import inspect
from typing import Any

from zsseg_rt.models.registry import find_builder
from zsseg_rt.torch_files.clip_space import describe_rows, describe_space
from zsseg_rt.training.config import ModelConfig, TextConfig
from zsseg_rt.training.loop import is_run
from zsseg_rt.training.trained.card import load_classes


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
    return describe_space(source, _clip_name(model)) if source else ""


def _clip_name(model: ModelConfig) -> str:
    """open_clip's name of the model's CLIP: as given, or the builder's default."""
    builder: Any = find_builder(model.architecture, official=False)
    default = inspect.signature(builder).parameters["clip"].default
    return str(model.options.get("clip", default))
