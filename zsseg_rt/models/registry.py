"""Architectures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from zsseg_rt.errors import CheckpointError
from zsseg_rt.models.zegclip import zegclip_from_official

__all__ = ["from_official"]

_FROM_OFFICIAL: Mapping[str, Callable[..., nn.Module]] = {"zegclip": zegclip_from_official}


def from_official(architecture: str, state_dict: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Build a model from what its authors published.

    Args:
        architecture: ``"zegclip"``.
        state_dict: Official keys, float32: exactly what the checkpoint's ``state_dict`` holds.
        **config: What shapes cannot tell, with official defaults; see
            :func:`zsseg_rt.models.zegclip.zegclip_from_official`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The architecture is unknown, or the ``state_dict`` is not of it; the
            message lists the first offending keys.
    """
    builder = _FROM_OFFICIAL.get(architecture)
    if builder is None:
        raise CheckpointError(
            f"architecture: expected one of {', '.join(sorted(_FROM_OFFICIAL))}, "
            f"got '{architecture}'. Check the spelling."
        )
    return builder(state_dict, **config)
