"""Architectures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsseg_rt import schema
from zsseg_rt.argument_names import current_name
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.dense.cosine_head import (
    CosineHeadConfig,
    CosineHeadModel,
    cosine_head_from_clip,
)
from zsseg_rt.models.dense.dense_clip import DenseCLIP, DenseCLIPConfig, dense_clip_from_clip
from zsseg_rt.models.descriptor.clip_rc import ClipRC, ClipRCConfig, clip_rc_from_official
from zsseg_rt.models.descriptor.clip_rc_from_clip import clip_rc_from_clip
from zsseg_rt.models.descriptor.zegclip import (
    ZegCLIP,
    ZegCLIPConfig,
    zegclip_from_clip,
    zegclip_from_official,
)
from zsseg_rt.models.zegformer.config import ZegFormerConfig
from zsseg_rt.models.zegformer.from_clip import zegformer_from_clip
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.models.zegformer.official import zegformer_from_official
from zsseg_rt.models.zeroseg.config import ZeroSegConfig
from zsseg_rt.models.zeroseg.model import ZeroSeg
from zsseg_rt.models.zeroseg.weights import create_zeroseg

__all__ = ["ARCHITECTURES", "Architecture", "create_model", "find_builder", "from_official"]

Builder = Callable[..., SegmentationModel]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How models of one architecture are made.

    Attributes:
        model: Their class; called with a ``config``, it returns an untrained model.
        config: The class of their configuration.
        create: Builds one to train; called by :func:`create_model`.
        from_official: Builds one from its authors' ``state_dict``; None where none was published.
    """

    model: Callable[[Any], SegmentationModel]
    config: type[Any]
    create: Builder
    from_official: Builder | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "clip_rc": Architecture(
        model=ClipRC,
        config=ClipRCConfig,
        create=clip_rc_from_clip,
        from_official=clip_rc_from_official,
    ),
    "cosine_head": Architecture(
        model=CosineHeadModel, config=CosineHeadConfig, create=cosine_head_from_clip
    ),
    "dense_clip": Architecture(
        model=DenseCLIP, config=DenseCLIPConfig, create=dense_clip_from_clip
    ),
    "zegclip": Architecture(
        model=ZegCLIP,
        config=ZegCLIPConfig,
        create=zegclip_from_clip,
        from_official=zegclip_from_official,
    ),
    "zegformer": Architecture(
        model=ZegFormer,
        config=ZegFormerConfig,
        create=zegformer_from_clip,
        from_official=zegformer_from_official,
    ),
    "zeroseg": Architecture(model=ZeroSeg, config=ZeroSegConfig, create=create_zeroseg),
}


def from_official(
    architecture: str, state_dict: Mapping[str, Tensor], **config: Any
) -> SegmentationModel:
    """Build a model from the weights that its authors published.

    Args:
        architecture: ``"clip_rc"``, ``"zegclip"`` or ``"zegformer"``.
        state_dict: Official keys, float32: exactly what the checkpoint's ``state_dict`` holds.
        **config: What cannot be read from shapes, with official defaults; see
            :func:`zsseg_rt.models.descriptor.clip_rc.clip_rc_from_official`,
            :func:`zsseg_rt.models.descriptor.zegclip.zegclip_from_official` and
            :func:`zsseg_rt.models.zegformer.official.zegformer_from_official`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the ``state_dict`` does not match it; the
            message lists the first offending keys.
    """
    return find_builder(architecture, official=True)(state_dict, **config)


def create_model(architecture: str, **config: Any) -> SegmentationModel:
    """Build a model that starts from CLIP or MAE weights, or from our own checkpoints.

    Args:
        architecture: ``"clip_rc"``, ``"cosine_head"``, ``"dense_clip"``, ``"zegclip"``,
            ``"zegformer"`` or ``"zeroseg"``.
        **config: Weights and the architecture's settings; see
            :func:`zsseg_rt.models.descriptor.clip_rc_from_clip.clip_rc_from_clip`,
            :func:`zsseg_rt.models.dense.cosine_head.cosine_head_from_clip`,
            :func:`zsseg_rt.models.dense.dense_clip.dense_clip_from_clip`,
            :func:`zsseg_rt.models.descriptor.zegclip.zegclip_from_clip`,
            :func:`zsseg_rt.models.zegformer.from_clip.zegformer_from_clip` and
            :func:`zsseg_rt.models.zeroseg.weights.create_zeroseg`. Names of earlier versions, such
            as ``num_regions`` of CLIP-RC and ``ensemble`` of ZegFormer, are accepted.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the weights cannot be read.
    """
    architecture = current_name(architecture)
    builder = find_builder(architecture, official=False)
    return builder(**schema.up_to_date(ARCHITECTURES[architecture].config, config))


def find_builder(architecture: str, *, official: bool) -> Builder:
    """The function behind :func:`create_model`; with ``official``, behind :func:`from_official`.

    Its signature lists the architecture's settings.

    Raises:
        CheckpointError: The architecture is unknown.
    """
    builders = {
        name: known.from_official if official else known.create
        for name, known in ARCHITECTURES.items()
    }
    builder = builders.get(architecture)
    if builder is None:
        known = ", ".join(name for name, builder in builders.items() if builder is not None)
        raise CheckpointError(
            f"architecture: expected one of {known}, got '{architecture}'. Check the spelling."
        )
    return builder
