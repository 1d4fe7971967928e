"""Architectures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from zsseg_rt.errors import CheckpointError
from zsseg_rt.models.clip_rc import clip_rc_from_official
from zsseg_rt.models.clip_rc_from_clip import clip_rc_from_clip
from zsseg_rt.models.dense_baseline import dense_baseline_from_clip
from zsseg_rt.models.dense_clip import dense_clip_from_clip
from zsseg_rt.models.zegclip import zegclip_from_clip, zegclip_from_official
from zsseg_rt.models.zegformer_from_clip import zegformer_from_clip
from zsseg_rt.models.zegformer_official import zegformer_from_official
from zsseg_rt.models.zeroseg_weights import create_zeroseg

__all__ = ["create_model", "find_builder", "from_official"]

_FROM_OFFICIAL: Mapping[str, Callable[..., nn.Module]] = {
    "clip_rc": clip_rc_from_official,
    "zegclip": zegclip_from_official,
    "zegformer": zegformer_from_official,
}
_CREATE: Mapping[str, Callable[..., nn.Module]] = {
    "clip_rc": clip_rc_from_clip,
    "dense_baseline": dense_baseline_from_clip,
    "dense_clip": dense_clip_from_clip,
    "zegclip": zegclip_from_clip,
    "zegformer": zegformer_from_clip,
    "zeroseg": create_zeroseg,
}


def from_official(architecture: str, state_dict: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Build a model from what its authors published.

    Args:
        architecture: ``"clip_rc"``, ``"zegclip"`` or ``"zegformer"``.
        state_dict: Official keys, float32: exactly what the checkpoint's ``state_dict`` holds.
        **config: What shapes cannot tell, with official defaults; see
            :func:`zsseg_rt.models.clip_rc.clip_rc_from_official`,
            :func:`zsseg_rt.models.zegclip.zegclip_from_official` and
            :func:`zsseg_rt.models.zegformer_official.zegformer_from_official`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the ``state_dict`` is not of it; the
            message lists the first offending keys.
    """
    return _find(_FROM_OFFICIAL, architecture)(state_dict, **config)


def create_model(architecture: str, **config: Any) -> nn.Module:
    """Build a model that starts from CLIP or MAE weights, or from our own training.

    Args:
        architecture: ``"clip_rc"``, ``"dense_baseline"``, ``"dense_clip"``, ``"zegclip"``,
            ``"zegformer"`` or ``"zeroseg"``.
        **config: Weights and the architecture's settings; see
            :func:`zsseg_rt.models.clip_rc_from_clip.clip_rc_from_clip`,
            :func:`zsseg_rt.models.dense_baseline.dense_baseline_from_clip`,
            :func:`zsseg_rt.models.dense_clip.dense_clip_from_clip`,
            :func:`zsseg_rt.models.zegclip.zegclip_from_clip`,
            :func:`zsseg_rt.models.zegformer_from_clip.zegformer_from_clip` and
            :func:`zsseg_rt.models.zeroseg_weights.create_zeroseg`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the weights cannot be read.
    """
    return _find(_CREATE, architecture)(**config)


def find_builder(architecture: str, *, official: bool) -> Callable[..., nn.Module]:
    """The function behind :func:`create_model`, or with ``official`` :func:`from_official`.

    Its signature tells an architecture's settings.

    Raises:
        CheckpointError: The architecture is unknown.
    """
    return _find(_FROM_OFFICIAL if official else _CREATE, architecture)


def _find(
    builders: Mapping[str, Callable[..., nn.Module]], architecture: str
) -> Callable[..., nn.Module]:
    if architecture not in builders:
        raise CheckpointError(
            f"architecture: expected one of {', '.join(sorted(builders))}, "
            f"got '{architecture}'. Check the spelling."
        )
    return builders[architecture]
