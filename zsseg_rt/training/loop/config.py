"""Settings of the training loop and of the optimizer, and learning rates over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated. The task sets rates and decays of parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's betas
    eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float | None = None  # L2 norm to which gradients are clipped; None does not clip

    def __post_init__(self) -> None:
        check_range(self, "betas", most=1 - 1e-9)
        check_range(self, "eps", "max_grad_norm", least=1e-30)


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
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    seed: int = 0  # Seed of everything random
    # Whether to use slower algorithms that give the same bits every time
    deterministic: bool = False
    # Optimizer steps between checkpoints: the most that a crash can cost
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2  # How many of the last checkpoints are kept, besides the best one
    # Steps whose checkpoints are also kept, to start other runs from
    kept_steps: tuple[int, ...] = ()
    evaluation_interval: int = 0  # Optimizer steps between evaluations; 0 evaluates only at the end
    best_metric: str = "hIoU"  # The figure by whose highest value a checkpoint is the best
    log_interval: int = 50  # Optimizer steps between lines of the history
    num_pictures: int = 4  # Prediction images per evaluation in TensorBoard
    num_workers: int = 2  # Processes that read images, per training process; 0 reads in place

    def __post_init__(self) -> None:
        check_range(self, "iterations", "batch_size", "accumulation_steps", least=1)
        check_range(self, "checkpoint_interval", "keep_checkpoints", "log_interval", least=1)
        check_range(self, "seed", "evaluation_interval", "num_pictures", "num_workers")

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


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run: a linear warm-up and a decay, as a factor in [0, 1].

    ``"poly"`` is mmcv's, as ZegCLIP configures it: its decay begins with the first step, and the
    warm-up multiplies it. ``"cosine"`` is MAE's and CLIP's: its decay begins after the warm-up.
    """

    name: Literal["poly", "cosine", "constant"] = "poly"  # "poly", "cosine" or "constant"
    power: float | None = None  # Exponent of "poly"; None means 0.9
    min_factor: float = 0.0  # Fraction of the peak rate at which the decay ends
    warmup_steps: int = 0  # Length of the linear warm-up
    # Fraction of the rate at the first step; None means 1e-6 for "poly", else 0
    warmup_start: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "warmup_steps")
        check_range(self, "min_factor", "warmup_start", most=1)
        unused = {"cosine": ("power",), "constant": ("power", "min_factor")}.get(self.name, ())
        for name in unused:
            if value := getattr(self, name):
                raise ArgumentError(f"{name}: expected none for {self.name!r}, got {value}.")

    def factor(self, step: int, iterations: int) -> float:
        """Factor of the peak rates at a step, from 0; steps beyond the last keep the last one."""
        steps, begin = self.warmup_steps, self.warmup_steps if self.name == "cosine" else 0
        if not 0 <= steps < max(iterations, 2):
            raise ArgumentError(
                f"warmup_steps: expected fewer than {iterations} iterations, got {steps}. "
                "Shorten the warm-up."
            )
        done = max(min(step, iterations) - begin, 0) / (iterations - begin)
        decay = 1.0
        if self.name == "poly":
            decay = (1 - done) ** (0.9 if self.power is None else self.power)
        elif self.name == "cosine":
            decay = (math.cos(math.pi * done) + 1) / 2
        factor = (1 - self.min_factor) * decay + self.min_factor
        start = self.warmup_start
        if start is None:
            start = 1e-6 if self.name == "poly" else 0.0
        return factor if step >= steps else factor * (1 - (1 - step / steps) * (1 - start))
