"""Learning rates over a run: pure functions from the step to a factor of the peak rate.

Steps count optimizer steps from 0. Steps beyond the last keep the last factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from zsseg_rt.errors import ArgumentError

ScheduleName = Literal["poly", "cosine", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
_SETTINGS: Mapping[str, Sequence[str]] = {
    "poly": ("power", "min_factor", "warmup_steps", "warmup_start"),
    "cosine": ("min_factor", "warmup_steps", "warmup_start"),
    "constant": (),
}


def poly(
    step: int,
    *,
    max_steps: int,
    power: float = 0.9,
    min_factor: float = 0.0,
    warmup_steps: int = 0,
    warmup_start: float = 1e-6,
) -> float:
    """Polynomial decay with a linear warm-up on top.

    ``(1 - min_factor) * (1 - step / max_steps) ** power + min_factor``; during the warm-up
    multiplied by ``1 - (1 - step / warmup_steps) * (1 - warmup_start)``.

    ZegCLIP and CLIP-RC: ``min_factor=0.005`` (1e-6 of 2e-4) and ``warmup_steps=1500``. ZegFormer:
    the defaults, which have no warm-up.

    Shapes:
        min_factor: Where the decay ends, in ``[0, 1]``.
        warmup_start: Factor of the warm-up at step 0, in ``[0, 1]``.

    Returns:
        The factor, in ``[0, 1]``.

    Source:
        mmcv's poly policy with linear warm-up, as ZegCLIP configures it.

    Example:
        >>> poly(5, max_steps=10, power=1.0)
        0.5
    """
    _check(step, max_steps, warmup_steps, min_factor=min_factor, warmup_start=warmup_start)
    decay: float = (1 - min(step, max_steps) / max_steps) ** power
    return ((1 - min_factor) * decay + min_factor) * _warmup(step, warmup_steps, warmup_start)


def cosine(
    step: int,
    *,
    max_steps: int,
    min_factor: float = 0.0,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Linear warm-up, then half a cosine over the steps that remain.

    MAE's and CLIP's schedule, and so ZeroSeg's (a quarter of the training is warm-up).

    Shapes:
        min_factor: Where the cosine ends, in ``[0, 1]``.
        warmup_start: Factor at step 0 of the warm-up, in ``[0, 1]``.

    Returns:
        The factor, in ``[0, 1]``.

    Source:
        Loshchilov and Hutter, "SGDR", ICLR 2017; He et al., "Masked Autoencoders", CVPR 2022.

    Example:
        >>> cosine(6, max_steps=10, warmup_steps=2)
        0.5
    """
    _check(step, max_steps, warmup_steps, min_factor=min_factor, warmup_start=warmup_start)
    if step < warmup_steps:
        return _warmup(step, warmup_steps, warmup_start)
    done = (min(step, max_steps) - warmup_steps) / (max_steps - warmup_steps)
    return min_factor + (1 - min_factor) * (math.cos(math.pi * done) + 1) / 2


def factor(name: ScheduleName, step: int, *, max_steps: int, **settings: Any) -> float:
    """Return the factor of a schedule by name.

    Returns:
        The factor, in ``[0, 1]``.
    """
    known = _SETTINGS.get(name, ())
    if name in _SETTINGS and set(settings) <= set(known):
        if name == "poly":
            return poly(step, max_steps=max_steps, **settings)
        return cosine(step, max_steps=max_steps, **settings) if known else 1.0
    raise ArgumentError(
        f"schedule: expected one of {', '.join(SCHEDULES)} with its settings, got {name!r} with "
        f"{', '.join(settings) or 'none'}. Check the spelling."
    )


def _warmup(step: int, warmup_steps: int, start: float) -> float:
    if step >= warmup_steps:
        return 1.0
    return 1 - (1 - step / warmup_steps) * (1 - start)


def _check(step: int, max_steps: int, warmup_steps: int, **factors: float) -> None:
    if step < 0 or max_steps < 1 or not 0 <= warmup_steps < max(max_steps, 2):
        raise ArgumentError(
            "max_steps: expected step >= 0 and 0 <= warmup_steps < max_steps, got step "
            f"{step}, warmup_steps {warmup_steps} and max_steps {max_steps}. Shorten the warm-up."
        )
    for name, value in factors.items():
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name}: expected a factor in [0, 1], got {value}. Use one in it.")
