"""Settings of the training loop and of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError

Precision = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated. The task sets rates and decays of parameter groups.

    Attributes:
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        max_grad_norm: L2 norm to which gradients are clipped; None does not clip.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None

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
    """How long, how and where a run trains.

    Attributes:
        iterations: Optimizer steps of the whole run.
        batch_size: Images per optimizer step, over all processes and accumulated parts. A run
            with more GPUs or more accumulation is the same run.
        accumulation_steps: Parts in which a process computes its share of the batch, to save
            memory.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"`` (GPU only, with loss scaling) of
            the model's computation; weights and optimizer stay float32.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"cuda"``.
        seed: Seed of everything random.
        deterministic: Whether to use slower algorithms that give the same bits every time.
        checkpoint_interval: Optimizer steps between checkpoints: the most that a crash can cost.
        keep_checkpoints: How many of the last checkpoints are kept, besides the best one.
        kept_steps: Steps whose checkpoints are also kept, to start other runs from.
        evaluation_interval: Optimizer steps between evaluations; 0 evaluates only at the end.
        best_metric: Which of the evaluation's figures decides which checkpoint is best.
        best_is: Whether the ``"highest"`` or the ``"lowest"`` figure is best.
        log_interval: Optimizer steps between lines of the history.
        num_pictures: Prediction images per evaluation in TensorBoard.
        num_workers: Processes that read images, per training process; 0 reads in place.
    """

    iterations: int = 20_000
    batch_size: int = 16
    accumulation_steps: int = 1
    precision: Precision = "float32"
    device: Device = "auto"
    seed: int = 0
    deterministic: bool = False
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2
    kept_steps: tuple[int, ...] = ()
    evaluation_interval: int = 0
    best_metric: str = "hIoU"
    best_is: Literal["highest", "lowest"] = "highest"
    log_interval: int = 50
    num_pictures: int = 4
    num_workers: int = 2

    def __post_init__(self) -> None:
        least_one = ("iterations", "batch_size", "accumulation_steps", "checkpoint_interval")
        for name in (*least_one, "keep_checkpoints", "log_interval"):
            _check_least(name, getattr(self, name), 1)
        for name in ("seed", "evaluation_interval", "num_pictures", "num_workers"):
            _check_least(name, getattr(self, name), 0)
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


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ArgumentError(f"{name}: expected at least {least}, got {value}. Choose a larger one.")
