"""float32 that means float32 on CUDA: no TF32 while a graph runs or is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zsseg_rt.backends._torch_graph.shared_setting import SharedSetting


def _switch_off() -> Callable[[], None]:
    """Return what restores the settings.

    torch 2.9 and newer keep an older and a newer setting of one thing, and refuse to compute where
    the two contradict each other: both are set.
    """
    import torch

    older: list[tuple[Any, str, Any]] = [
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "allow_tf32", False),
    ]
    cudnn: Any = torch.backends.cudnn
    newer: list[tuple[Any, str, Any]] = []
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        newer = [(torch.backends.cuda.matmul, "fp32_precision", "ieee")]
        newer += [(each, "fp32_precision", "ieee") for each in (cudnn.conv, cudnn.rnn)]
    before_newer = [_own_value(place, cudnn) for place, _, _ in newer]
    before_older = [_older_value(place) for place, _, _ in older]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two contradict each other already
        precision = ""
    for place, name, value in older + newer:
        setattr(place, name, value)

    def give_back() -> None:
        for (place, name, _), was_allowed in zip(older, before_older, strict=True):
            setattr(place, name, was_allowed)
        if precision == "medium":  # which a flag cannot say
            torch.set_float32_matmul_precision(precision)
        for (place, name, _), value in zip(newer, before_newer, strict=True):
            setattr(place, name, value)

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
    found = str(place.fp32_precision)
    return "none" if found == str(above.fp32_precision) else found


exact_float32 = SharedSetting(_switch_off)
"""Inside the block, TF32 is off in matrix products and convolutions, for the whole process."""
