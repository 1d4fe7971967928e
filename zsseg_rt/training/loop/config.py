"""Settings of the training loop and of the optimizer, and learning rates over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError

Precision = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated. The task sets rates and decays of parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's betas
    eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float | None = None  # L2 norm to which gradients are clipped; None does not clip

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ArgumentError(
                f"betas: expected two values in [0, 1), got {self.betas}. "
                "Use values such as (0.9, 0.999)."
            )
        if self.eps <= 0:
            raise ArgumentError(f"eps: expected a value above 0, got {self.eps}. Use 1e-8 or so.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ArgumentError(
                f"max_grad_norm: expected a value above 0, got {self.max_grad_norm}. "
                "Leave it out for no limit."
            )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how and where a run trains."""

    iterations: int = 20_000  # Optimizer steps of the whole run
    # Images per optimizer step, over all processes and accumulated parts. A run with more GPUs or
    # more accumulation is the same run
    batch_size: int = 16
    # Parts in which a process computes its share of the batch, to save memory
    accumulation_steps: int = 1
    # "float32", "bfloat16" or "float16" (GPU only, with loss scaling) of the model's computation;
    # weights and optimizer stay float32
    precision: Precision = "float32"
    device: Device = "auto"  # "auto" (a GPU if there is one), "cpu" or "cuda"
    seed: int = 0  # Seed of everything random
    # Whether to use slower algorithms that give the same bits every time
    deterministic: bool = False
    # Optimizer steps between checkpoints: the most that a crash can cost
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2  # How many of the last checkpoints are kept, besides the best one
    # Steps whose checkpoints are also kept, to start other runs from
    kept_steps: tuple[int, ...] = ()
    evaluation_interval: int = 0  # Optimizer steps between evaluations; 0 evaluates only at the end
    best_metric: str = "hIoU"  # Which of the evaluation's figures decides which checkpoint is best
    # Whether the "highest" or the "lowest" figure is best
    best_is: Literal["highest", "lowest"] = "highest"
    log_interval: int = 50  # Optimizer steps between lines of the history
    num_pictures: int = 4  # Prediction images per evaluation in TensorBoard
    num_workers: int = 2  # Processes that read images, per training process; 0 reads in place

    def __post_init__(self) -> None:
        least_one = ("iterations", "batch_size", "accumulation_steps", "checkpoint_interval")
        least = dict.fromkeys((*least_one, "keep_checkpoints", "log_interval"), 1)
        least |= dict.fromkeys(("seed", "evaluation_interval", "num_pictures", "num_workers"), 0)
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ArgumentError(
                    f"{name}: expected at least {number}, got {getattr(self, name)}. "
                    "Choose a larger one."
                )
        for name, kind in (("precision", Precision), ("device", Device)):
            check_choice(name, getattr(self, name), get_args(kind))
        check_choice("best_is", self.best_is, ("highest", "lowest"))

    def part_size(self, num_processes: int) -> int:
        """Images that one process computes at a time."""
        parts = num_processes * self.accumulation_steps
        if self.batch_size % parts:
            raise ArgumentError(
                f"batch_size: expected a multiple of {parts} ({num_processes} processes times "
                f"{self.accumulation_steps} accumulation steps), got {self.batch_size}. "
                "Change one of the three."
            )
        return self.batch_size // parts


def poly(
    step: int,
    *,
    max_steps: int,
    power: float = 0.9,
    min_factor: float = 0.0,
    warmup_steps: int = 0,
    warmup_start: float = 1e-6,
) -> float:
    """Polynomial decay with a linear warm-up on top, as a factor in ``[0, 1]`` of the peak rate.

    ``(1 - min_factor) * (1 - step / max_steps) ** power + min_factor``; during the warm-up
    multiplied by ``1 - (1 - step / warmup_steps) * (1 - warmup_start)``. Steps count optimizer
    steps from 0, and those beyond the last keep the last factor.

    ZegCLIP and CLIP-RC: ``min_factor=0.005`` (1e-6 of 2e-4) and ``warmup_steps=1500``. ZegFormer:
    the defaults, which have no warm-up.

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
    """Linear warm-up, then half a cosine over the steps that remain; a factor as of :func:`poly`.

    MAE's and CLIP's schedule, and so ZeroSeg's (a quarter of the training is warm-up).

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


def constant(step: int, *, max_steps: int) -> float:
    """The peak rate at every step."""
    return 1.0


def _warmup(step: int, warmup_steps: int, start: float) -> float:
    return 1.0 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - start)


def _check(step: int, max_steps: int, warmup_steps: int, **factors: float) -> None:
    if step < 0 or max_steps < 1 or not 0 <= warmup_steps < max(max_steps, 2):
        raise ArgumentError(
            "max_steps: expected step >= 0 and 0 <= warmup_steps < max_steps, got step "
            f"{step}, warmup_steps {warmup_steps} and max_steps {max_steps}. Shorten the warm-up."
        )
    for name, value in factors.items():
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name}: expected a factor in [0, 1], got {value}. Use one in it.")
