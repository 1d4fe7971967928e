"""Architectures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zsseg_rt.common import schema
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.cat_seg.model import CatSeg, CatSegConfig, CatSegStart, OfficialCatSeg
from zsseg_rt.models.dense.dense_clip import (
    CosineHeadConfig,
    CosineHeadModel,
    CosineHeadStart,
    DenseCLIP,
    DenseCLIPConfig,
    DenseCLIPStart,
    OfficialDenseCLIP,
    OfficialTips,
    Tips,
    TipsConfig,
    TipsStart,
)
from zsseg_rt.models.descriptor.model import (
    ClipRC,
    ClipRCConfig,
    ClipRCStart,
    OfficialClipRC,
    OfficialZegCLIP,
    ZegCLIP,
    ZegCLIPConfig,
    ZegCLIPStart,
)
from zsseg_rt.models.zegformer.model import (
    OfficialZegFormer,
    ZegFormer,
    ZegFormerConfig,
    ZegFormerStart,
)
from zsseg_rt.models.zeroseg.model import ZeroSeg, ZeroSegConfig, ZeroSegStart

Builder = Callable[..., Any]


@dataclass(frozen=True)
class Architecture:
    """How models of one architecture are made."""

    # Their class; called with a config, it returns an untrained model
    model: Callable[[Any], SegmentationModel]
    config: type[Any]  # The class of their configuration
    create: Builder  # Takes the settings of one to train; build() of what it returns makes it
    # Takes the settings of one from its authors' weights, which build gets; None where none were
    # published
    from_official: Builder | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "cat_seg": Architecture(CatSeg, CatSegConfig, CatSegStart, OfficialCatSeg),
    "clip_rc": Architecture(ClipRC, ClipRCConfig, ClipRCStart, OfficialClipRC),
    "cosine_head": Architecture(CosineHeadModel, CosineHeadConfig, CosineHeadStart),
    "dense_clip": Architecture(DenseCLIP, DenseCLIPConfig, DenseCLIPStart, OfficialDenseCLIP),
    "tips": Architecture(Tips, TipsConfig, TipsStart, OfficialTips),
    "zegclip": Architecture(ZegCLIP, ZegCLIPConfig, ZegCLIPStart, OfficialZegCLIP),
    "zegformer": Architecture(ZegFormer, ZegFormerConfig, ZegFormerStart, OfficialZegFormer),
    "zeroseg": Architecture(ZeroSeg, ZeroSegConfig, ZeroSegStart),
}


def from_official(
    architecture: str, state_dict: Mapping[str, Any], **config: Any
) -> SegmentationModel:
    """Build a model from the weights that its authors published.

    Args:
        architecture: ``"cat_seg"``, ``"clip_rc"``, ``"dense_clip"``, ``"tips"``, ``"zegclip"`` or
            ``"zegformer"``.
        state_dict: Official keys, float32: exactly what the checkpoint's ``state_dict`` holds; for
            TIPS ``{"vision": ..., "text": ...}``, as its two files.
        **config: What cannot be read from shapes, with official defaults: the settings of the
            class that :data:`ARCHITECTURES` has as ``from_official``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the ``state_dict`` does not match it; the
            message lists the first offending keys.
    """
    model: SegmentationModel = find_builder(architecture, official=True)(**config).build(state_dict)
    return model


def create_model(architecture: str, **config: Any) -> SegmentationModel:
    """Build a model that starts from CLIP or MAE weights, or from our own checkpoints.

    Args:
        architecture: ``"cat_seg"``, ``"clip_rc"``, ``"cosine_head"``, ``"dense_clip"``, ``"tips"``,
            ``"zegclip"``, ``"zegformer"`` or ``"zeroseg"``.
        **config: Weights and the architecture's settings: those of the class that
            :data:`ARCHITECTURES` has as ``create``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArgumentError: A setting is unknown or out of its range.
        CheckpointError: The architecture is unknown, or the weights cannot be read.
    """
    builder = find_builder(architecture, official=False)
    settings = schema.setting_names(builder) or []
    for name in config:
        if name not in settings:
            raise ArgumentError(
                f"{name}: expected a setting of {architecture}, got an unknown one. "
                f"{schema.nearest(name, settings)}"
            )
    model: SegmentationModel = builder(**config).build()
    return model


def find_builder(architecture: str, *, official: bool) -> Builder:
    """The builder whose settings :func:`create_model` or :func:`from_official` takes."""
    builders = {
        name: entry.from_official if official else entry.create
        for name, entry in ARCHITECTURES.items()
    }
    builder = builders.get(architecture)
    if builder is None:
        names = ", ".join(name for name, builder in builders.items() if builder is not None)
        raise CheckpointError(
            f"architecture: expected one of {names}, got '{architecture}'. Check the spelling."
        )
    return builder
