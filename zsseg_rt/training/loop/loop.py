"""The training loop: iterations, checkpoints, evaluation, for any task and data.

Every step is decided by the step's number, the checkpoint and the seed, never by the clock, so a
resumed run equals one that was not interrupted.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, CheckpointError, TrainingError
from zsseg_rt.training.config import LoopConfig, OptimizerConfig
from zsseg_rt.training.loop.checkpointing import CheckpointFolder, read_checkpoint
from zsseg_rt.training.loop.reporting import EvaluationLog, NamedImage, RunReport, Timing
from zsseg_rt.training.loop.run_state import (
    RunState,
    determinism,
    preserved_random_state,
    raise_together,
)

Schedule = Callable[[int], float]
"""From the number of optimizer steps done to the factor of every group's own rate."""

BatchSource = Callable[..., Iterator[Any]]
"""Starts an endless stream of batches at a position, in batches of one process.

It is called with ``start_position``, ``process_index``, ``num_processes`` and ``batch_size``. Of
each ``num_processes * batch_size`` images of the run's order, process 0 takes the first.
"""


Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Figures of a model by name; called on the main process, in evaluation mode, without gradients."""

Preview = Callable[[nn.Module, int], list[NamedImage]]
"""Up to so many images of what a model predicts, for TensorBoard."""

_SECOND_INTERRUPT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a run."""

    run_folder: Path  # Where everything is
    step: int  # Optimizer steps done
    finished: bool  # Whether all iterations are done; False after Ctrl-C or SIGTERM
    losses: Mapping[str, float]  # Means of the loss terms since the last line of the history
    metrics: Mapping[str, float]  # Figures of the best evaluation; empty without one
    best_step: int | None  # Step of the best checkpoint; None without an evaluation
    best_checkpoint: Path  # Its file; the last one without an evaluation
    last_checkpoint: Path  # File of the last checkpoint
    timing: Timing  # Where the time of this process went


def run_loop(  # noqa: PLR0913 - what a run consists of, by name
    task: nn.Module,
    batches: BatchSource,
    *,
    config: LoopConfig,
    run_folder: str | Path,
    optimizer: OptimizerConfig | None = None,
    schedule: Schedule = lambda step: 1.0,
    evaluate: Evaluate | None = None,
    preview: Preview | None = None,
    model_card: Mapping[str, Any] | None = None,
    constants: Callable[[], Mapping[str, Tensor]] = dict,
    resume: bool = False,
) -> TrainingResult:
    """Train, or continue to train, and write checkpoints, a history and a summary.

    ``model_card`` and ``constants`` are saved beside the weights: what is needed to build the model
    again, and tensors such as class embeddings.
    """
    with ExitStack() as stack:
        stack.enter_context(determinism(config.deterministic))
        loop = _Loop(
            folder=Path(run_folder),
            config=config,
            state=RunState(task, config, optimizer or OptimizerConfig()),
            schedule=schedule,
            evaluate=evaluate,
            preview=preview,
            model_card=model_card or {},
            constants=constants,
            stop_requests=stack.enter_context(stop_on_signals()),
        )
        loop.start(resume)
        stack.enter_context(loop.report)
        return loop.run(batches)


@dataclass(kw_only=True)
class _Loop:
    """One run on one process."""

    folder: Path
    config: LoopConfig
    state: RunState
    schedule: Schedule
    evaluate: Evaluate | None
    preview: Preview | None
    model_card: Mapping[str, Any]
    constants: Callable[[], Mapping[str, Tensor]]
    stop_requests: Sequence[float]
    timing: Timing = field(default_factory=Timing)
    losses: Mapping[str, float] = field(default_factory=dict)  # means of the last line
    window: list[dict[str, float]] = field(default_factory=list)  # of the steps since then
    saved_step: int = 0

    def start(self, resume: bool) -> None:
        """Restore the last checkpoint, or make sure that there is none."""
        self.is_main = bool(self.state.accelerator.is_main_process)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints")
        steps = self.checkpoints.steps()
        if steps and not resume:
            raise ArgumentError(
                f"run_folder: expected a folder without a run, got {self.folder}, which holds "
                f"checkpoints up to step {steps[-1]}. Pass --resume to continue that run, or "
                "choose another folder."
            )
        self.state.accelerator.wait_for_everyone()  # all have looked before anything changes
        if self.is_main:
            self.checkpoints.remove_leftovers()
        if steps:
            checkpoint = read_checkpoint(self.checkpoints.at(steps[-1]))
            try:
                self.state.restore(checkpoint)
            except CheckpointError as error:
                raise CheckpointError(f"{self.checkpoints.at(steps[-1])}: {error}") from error
            self.saved_step, self.losses = self.state.step, checkpoint.losses
        self._read_evaluations()
        self.report = RunReport(
            self.folder,
            first_step=self.state.step,
            total=self.config.iterations,
            active=self.is_main,
        )

    def run(self, batches: BatchSource) -> TrainingResult:
        """Train to the end or until asked to stop."""
        try:
            self._train(batches)
        except OSError as error:
            raise TrainingError(
                f"{error.filename or self.folder}: cannot be written: "
                f"{error.strerror or error}. {self.checkpoints.describe_last()}"
            ) from error
        except TrainingError as error:
            raise TrainingError(f"{error} {self.checkpoints.describe_last()}") from error
        return self._finish()

    def _train(self, batches: BatchSource) -> None:
        state, accelerator = self.state, self.state.accelerator
        if self._evaluation_is_due() and not self.evaluations.of(state.step):
            self._evaluate()  # the run was killed between a checkpoint and its evaluation
        source = batches(
            start_position=state.step * self.config.batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            batch_size=state.part_size,
        )
        stopped = False
        while state.step < self.config.iterations and not stopped:
            stopped = self._train_step(source)
            step, config = state.step, self.config
            if step % config.log_interval == 0 or step == config.iterations or stopped:
                self._write_scalars()
            self._save_and_evaluate(stopped)

    def _train_step(self, source: Iterator[Any]) -> bool:
        """Forward and backward for every part of a batch, then the update; whether to stop now."""
        state, parts = self.state, self.config.accumulation_steps
        state.scale_learning_rates(self.schedule(state.step))
        state.task.train()
        means: dict[str, Tensor] = {}
        names: list[str] = []
        for _ in range(parts):
            with self.timing.measure("data" if self.timing.steps else "start"):
                batch = next(source).to(state.accelerator.device)
            names += batch.names
            with self.timing.measure("step"):
                for name, value in state.backward(batch).items():
                    means[name] = means.get(name, 0.0) + value / parts
        state.step += 1
        self.timing.steps += 1
        self.timing.pictures += self.config.batch_size
        with self.timing.measure("step"):
            shared, stopped = state.share_losses(means, names, bool(self.stop_requests))
        self.window.append(shared)
        return stopped

    def _write_scalars(self) -> None:
        """Write a line of the history."""
        self.losses = {name: fmean(step[name] for step in self.window) for name in self.window[0]}
        self.window.clear()
        scalars = {f"loss/{name}": value for name, value in self.losses.items()}
        scalars["loss/total"] = sum(self.losses.values())
        for index, group in enumerate(self.state.optimizer.param_groups):
            scalars[f"learning_rate/{index}" if index else "learning_rate"] = group["lr"]
        scalars["time/overhead_share"] = self.timing.overhead_share
        scalars["time/pictures_per_second"] = self.timing.pictures_per_second
        with self.timing.measure("report"):
            self.report.scalars(self.state.step, scalars)

    def _save_and_evaluate(self, stopped: bool) -> None:
        step, config = self.state.step, self.config
        evaluation_is_due = self._evaluation_is_due()
        due = step % config.checkpoint_interval == 0 or step in config.kept_steps
        if due or step == config.iterations or evaluation_is_due or stopped:
            self._save()
        if evaluation_is_due and not stopped:
            self._evaluate()

    def _save(self) -> None:
        with self.timing.measure("checkpoint"):
            checkpoint = self.state.capture(self.losses, self.model_card, self.constants())
            error: TrainingError | None = None
            if self.is_main:
                try:
                    self.checkpoints.save(checkpoint)
                    self._prune()
                except TrainingError as failure:
                    error = failure
            raise_together(self.state.accelerator, error)
        self.saved_step = self.state.step

    def _prune(self) -> None:
        protected = (*self.config.kept_steps, self.evaluations.best_step)
        self.checkpoints.prune(self.config.keep_checkpoints, protected)

    def _evaluation_is_due(self) -> bool:
        interval, step = self.config.evaluation_interval, self.state.step
        if self.evaluate is None or not step:
            return False
        return step == self.config.iterations or bool(interval and step % interval == 0)

    def _evaluate(self) -> None:
        """Evaluate the model on the main process without using training's random numbers."""
        with self.timing.measure("evaluation"), preserved_random_state(), torch.no_grad():
            if self.is_main and self.evaluate is not None:
                step, model = self.state.step, self.state.plain_task.model.eval()
                metrics = dict(self.evaluate(model))
                self.evaluations.add(step, metrics)
                self.report.scalars(step, {f"evaluation/{k}": v for k, v in metrics.items()})
                if self.preview is not None and self.config.num_pictures:
                    self.report.images(step, self.preview(model, self.config.num_pictures))
                self._prune()
            self.state.accelerator.wait_for_everyone()
        self._read_evaluations()

    def _read_evaluations(self) -> None:
        self.evaluations = EvaluationLog(self.folder, self.config.best_metric, self.state.step)

    def _finish(self) -> TrainingResult:
        step, best = self.state.step, self.evaluations.best_step
        result = TrainingResult(
            run_folder=self.folder,
            step=step,
            finished=step == self.config.iterations,
            losses=self.losses,
            metrics={} if best is None else self.evaluations.of(best),
            best_step=best,
            best_checkpoint=self.checkpoints.at(step if best is None else best),
            last_checkpoint=self.checkpoints.at(self.saved_step),
            timing=self.timing,
        )
        accelerator, device = self.state.accelerator, self.state.accelerator.device
        fields = ("step", "finished", "losses", "best_step", "metrics")
        self.report.summary(
            {name: getattr(result, name) for name in fields}
            | {
                "timing": self.timing.to_dict(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "num_processes": accelerator.num_processes,
                "torch": torch.__version__,
            }
        )
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(self.state.task, keep_fp32_wrapper=False)
        return result


@contextmanager
def stop_on_signals() -> Iterator[Sequence[float]]:
    """Turn SIGINT and SIGTERM into requests to stop after the step: the times when they came.

    A second Ctrl-C, at least a second later, stops at once. Outside the main thread, where Python
    allows no handlers, nothing is installed.
    """
    requests: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        requests.append(time.monotonic())
        # a launcher repeats signals within milliseconds; only a person's second one counts
        if number == signal.SIGINT and requests[-1] - requests[0] > _SECOND_INTERRUPT_SECONDS:
            raise KeyboardInterrupt

    on_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if on_main_thread else ()
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
