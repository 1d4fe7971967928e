"""Which of torch's attention kernels a graph takes: always the same, and reported."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from zsseg_rt.backends._torch_graph.shared_setting import SharedSetting
from zsseg_rt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("flash", "efficient", "cudnn")
_SETTING = "ZSSEG_TORCH_ATTENTION"
_log = logging.getLogger(__name__)


def wanted() -> tuple[str, ...]:
    """The kinds to try, the first that can run being taken; ``$ZSSEG_TORCH_ATTENTION`` leads.

    cuDNN's is tried where it is asked for alone: it builds a plan for each new shape.
    """
    first = os.environ.get(_SETTING) or "flash"
    if first not in KINDS:
        raise ConfigError(
            f"{_SETTING}: expected one of {', '.join(KINDS)}, got {first!r}. Unset it for 'flash'."
        )
    if first != "flash" and not _takes_an_order():
        return (first,)  # torch's own order begins with flash
    return (first, *(kind for kind in KINDS[:2] if kind != first))


@functools.cache
def _takes_an_order() -> bool:
    """Whether this torch takes an order; some versions from 2.6 on only take which may run."""
    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


def kind_taken(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kind that torch takes inside :data:`pinned_attention`; ``"unfused"`` if none can run."""
    from torch.backends import cuda

    given = cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    can_use: dict[str, Callable[[cuda.SDPAParams], bool]] = {
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
        "cudnn": cuda.can_use_cudnn_attention,
    }
    found = next((kind for kind in wanted() if can_use[kind](given)), "unfused")
    if found == "unfused":
        _warn(str(q.dtype).removeprefix("torch."), q.shape[-1])
    return found


@functools.cache
def _warn(dtype: str, width: int) -> None:
    _log.warning(
        "attention: torch has no fused kernel here for heads of %d in %s, and takes several. "
        "Use precision='float16' or backend 'tensorrt'.",
        width,
        dtype,
    )


def kinds_on(device: str) -> dict[str, str]:
    """The kind that a CLIP's attention takes on a GPU, by what is asked of it; none without one."""
    import torch

    if not torch.cuda.is_available():
        return {}

    def kind(dtype: torch.dtype, *, masked: bool = False) -> str:
        q = torch.empty(1, 12, 64, 64, dtype=dtype, device=device)
        return kind_taken(q, q, q, q[0, :1] if masked else None)

    half = torch.float16
    return {
        "float16": kind(half),
        "float16 with a mask": kind(half, masked=True),
        "float32": kind(torch.float32),
    }


def _pin() -> Callable[[], None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    members = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    order = [*(members[kind] for kind in wanted()), SDPBackend.MATH]
    pinned = ExitStack()
    settings = {"set_priority": True} if _takes_an_order() else {}
    pinned.enter_context(sdpa_kernel(order, **settings))
    return pinned.close


pinned_attention = SharedSetting(_pin)
"""Inside the block torch takes the wanted kinds in their order, whatever its version prefers."""
