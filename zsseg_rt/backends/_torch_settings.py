"""Settings of torch for a process: the attention kernels it takes, and whether TF32 is allowed."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from zsseg_rt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("flash", "efficient", "cudnn")
_SETTING = "ZSSEG_TORCH_ATTENTION"
_log = logging.getLogger(__name__)


class SharedSetting:
    """A setting that several threads share: the first one makes it, the last undoes it."""

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._inside = 0
        self._undo: Callable[[], None] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo = self._make()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._undo is not None:
                    self._undo()


def first_kind() -> str:
    """The kind that ``$ZSSEG_TORCH_ATTENTION`` names."""
    first = os.environ.get(_SETTING) or "flash"
    if first not in KINDS:
        raise ConfigError(
            f"{_SETTING}: expected one of {', '.join(KINDS)}, got {first!r}. Unset it for 'flash'."
        )
    return first


def wanted() -> tuple[str, ...]:
    """The kinds to try, the first that can run being taken.

    cuDNN's is tried where it is asked for alone: it builds a plan for each new shape.
    """
    first = first_kind()
    if first != "flash":
        from torch.nn.attention import sdpa_kernel

        if not _takes_an_order(sdpa_kernel):
            return (first,)  # torch's own order begins with flash
    return (first, *(kind for kind in KINDS[:2] if kind != first))


@functools.cache
def _takes_an_order(sdpa_kernel: Callable[..., Any]) -> bool:
    """Whether this torch takes an order; some versions from 2.6 on only take which may run."""
    return "set_priority" in inspect.signature(sdpa_kernel).parameters


def kind_taken(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The kind that torch takes inside :data:`pinned_attention`; ``"unfused"`` if none can run."""
    from torch.backends import cuda

    params = cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    can_use: dict[str, Callable[[cuda.SDPAParams], bool]] = {
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
        "cudnn": cuda.can_use_cudnn_attention,
    }
    kind = next((kind for kind in wanted() if can_use[kind](params)), "unfused")
    if kind == "unfused":
        _warn(str(q.dtype).removeprefix("torch."), q.shape[-1])
    return kind


@functools.cache
def _warn(dtype: str, width: int) -> None:
    _log.warning(
        "attention: torch has no fused kernel here for heads of %d in %s, and takes several. "
        "Use precision='float16' or backend 'tensorrt'.",
        width,
        dtype,
    )


def _pin() -> Callable[[], None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    members = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    order = [*(members[kind] for kind in wanted()), SDPBackend.MATH]
    pinned = ExitStack()
    settings = {"set_priority": True} if _takes_an_order(sdpa_kernel) else {}
    # Newer versions of torch keep a token that only the same context may give back, in any thread.
    context = contextvars.copy_context()
    context.run(pinned.enter_context, sdpa_kernel(order, **settings))
    return functools.partial(context.run, pinned.close)


pinned_attention = SharedSetting(_pin)
"""Inside the block torch takes the wanted kinds in their order, whatever its version prefers."""


def _switch_off() -> Callable[[], None]:
    """Switch TF32 off; return a function that restores the settings."""
    import torch

    # torch 2.9 and newer keep an older and a newer setting of one thing, and refuse to compute
    # where the two contradict each other: both are set.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    older, has_newer = (matmul, cudnn), hasattr(matmul, "fp32_precision")
    newer = (matmul, cudnn.conv, cudnn.rnn) if has_newer else ()
    before_newer = [_own_value(place, cudnn) for place in newer]
    before_older = [_older_value(place) for place in older]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two contradict each other already
        precision = ""
    for place in older:
        place.allow_tf32 = False
    for place in newer:
        place.fp32_precision = "ieee"

    def give_back() -> None:
        for place, was_allowed in zip(older, before_older, strict=True):
            place.allow_tf32 = was_allowed
        if precision == "medium":  # which a flag cannot say
            torch.set_float32_matmul_precision(precision)
        for place, value in zip(newer, before_newer, strict=True):
            place.fp32_precision = value

    return give_back


def _older_value(place: Any) -> bool:
    try:
        return bool(place.allow_tf32)
    except RuntimeError:  # it contradicts the newer one
        return bool(place.fp32_precision != "tf32")


def _own_value(place: Any, cudnn: Any) -> str:
    """A newer setting, ``"none"`` where it is inherited; torch reports only what results."""
    import torch

    above = torch.backends if place is torch.backends.cuda.matmul else cudnn
    own = str(place.fp32_precision)
    return "none" if own == str(above.fp32_precision) else own


exact_float32 = SharedSetting(_switch_off)
"""Inside the block, TF32 is off in matrix products and convolutions, for the whole process."""
