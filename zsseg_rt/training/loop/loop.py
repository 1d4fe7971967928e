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
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, CheckpointError, TrainingError
from zsseg_rt.training.loop.checkpointing import CheckpointFolder
from zsseg_rt.training.loop.config import LoopConfig, OptimizerConfig
from zsseg_rt.training.loop.reporting import EvaluationLog, NamedImage, RunReport, Timing
from zsseg_rt.training.loop.run_state import (
    RunState,
    determinism,
    gather,
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


@dataclass(frozen=True, kw_only=True)
class RunExtras:
    """Optional parts of a run besides a task and its batches."""

    # Figures of the model, by name; called on the main process in evaluation mode without gradients
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    # Up to so many images of what the model predicts, for TensorBoard
    preview: Callable[[nn.Module, int], list[NamedImage]] | None = None
    # What is saved beside the weights so that the model can be built again
    model_card: Mapping[str, Any] = field(default_factory=dict)
    # Gives tensors that are saved beside them, such as class embeddings
    constants: Callable[[], Mapping[str, Tensor]] = dict


def run_loop(
    task: nn.Module,
    batches: BatchSource,
    *,
    config: LoopConfig,
    run_folder: str | Path,
    optimizer: OptimizerConfig | None = None,
    schedule: Schedule | None = None,
    extras: RunExtras | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train, or continue to train, and write checkpoints, a history and a summary."""
    with ExitStack() as stack:
        stack.enter_context(determinism(config.deterministic))
        stop = stack.enter_context(stop_on_signals())
        state = RunState(task, config, optimizer or OptimizerConfig())
        loop = _Loop(Path(run_folder), config, state, schedule, extras or RunExtras())
        loop.start(resume)
        report = RunReport(
            loop.folder,
            first_step=state.step,
            total=config.iterations,
            active=loop.is_main,
        )
        return loop.run(batches, stop, stack.enter_context(report))


class _Loop:
    """One run on one process."""

    def __init__(
        self,
        folder: Path,
        config: LoopConfig,
        state: RunState,
        schedule: Schedule | None,
        extras: RunExtras,
    ) -> None:
        self.folder, self.config, self.state = folder, config, state
        self.schedule, self.extras = schedule, extras
        self.is_main = bool(state.accelerator.is_main_process)
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.evaluations = EvaluationLog(folder, config.best_metric)
        self.step_losses = StepLosses(state.accelerator)
        self.timing = Timing()
        self.losses: dict[str, float] = {}
        self.saved_step = 0

    def start(self, resume: bool) -> None:
        """Restore the last checkpoint, or make sure that there is none."""
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
            checkpoint = self.checkpoints.load(steps[-1])
            try:
                self.state.restore(checkpoint)
            except CheckpointError as error:
                raise CheckpointError(f"{self.checkpoints.at(steps[-1])}: {error}") from error
            self.saved_step, self.losses = self.state.step, dict(checkpoint.losses)
        self.evaluations.load(last_step=self.state.step)

    def run(self, batches: BatchSource, stop: StopRequest, report: RunReport) -> TrainingResult:
        """Train to the end or until asked to stop."""
        self.report, self.stop = report, stop
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
            self._train_step(source)
            with self.timing.measure("step"):
                stopped = self.step_losses.stop_is_agreed(self.stop.requested)
            self._log(stopped)
            self._save_and_evaluate(stopped)

    def _train_step(self, source: Iterator[Any]) -> None:
        """One optimizer step: forward and backward for every part of the batch, then the update."""
        state, parts = self.state, self.config.accumulation_steps
        if self.schedule is not None:
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
            self.step_losses.add(state.step, means, names, self.stop.requested)

    def _log(self, stopped: bool) -> None:
        """Write a line of the history when it is due."""
        step = self.state.step
        due = step % self.config.log_interval == 0 or step == self.config.iterations or stopped
        if due:
            with self.timing.measure("step"):
                self.step_losses.drain()
            with self.timing.measure("report"):
                self._write_scalars()

    def _write_scalars(self) -> None:
        self.losses = self.step_losses.take_means()
        scalars = {f"loss/{name}": value for name, value in self.losses.items()}
        scalars["loss/total"] = sum(self.losses.values())
        for index, group in enumerate(self.state.optimizer.param_groups):
            scalars[f"learning_rate/{index}" if index else "learning_rate"] = group["lr"]
        scalars["time/overhead_share"] = self.timing.overhead_share
        scalars["time/pictures_per_second"] = self.timing.pictures_per_second
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
        with self.timing.measure("step"):
            self.step_losses.drain()
        with self.timing.measure("checkpoint"):
            checkpoint = self.state.capture(
                self.losses, self.extras.model_card, self.extras.constants()
            )
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
        if self.extras.evaluate is None or not step:
            return False
        return step == self.config.iterations or bool(interval and step % interval == 0)

    def _evaluate(self) -> None:
        """Evaluate the model on the main process without using training's random numbers."""
        with self.timing.measure("evaluation"), preserved_random_state(), torch.no_grad():
            if self.is_main and self.extras.evaluate is not None:
                step, model = self.state.step, self.state.plain_task.model.eval()
                metrics = dict(self.extras.evaluate(model))
                self.evaluations.add(step, metrics)
                self.report.scalars(step, {f"evaluation/{k}": v for k, v in metrics.items()})
                if self.extras.preview is not None and self.config.num_pictures:
                    self.report.images(step, self.extras.preview(model, self.config.num_pictures))
                self._prune()
            self.state.accelerator.wait_for_everyone()
        self.evaluations.load(last_step=self.state.step)

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


class StepLosses:
    """Collects loss terms and checks that they are finite.

    A step's losses are read after the next step has been started, so that a GPU never waits for
    them; :meth:`drain` reads what is left.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._pending: _Pending | None = None
        self._window: dict[str, list[float]] = {}

    def add(self, step: int, means: Mapping[str, Tensor], names: Sequence[str], stop: bool) -> None:
        """Add a step, and read the one before; all processes must call it alike."""
        losses = torch.stack(list(means.values()))
        bad = (~torch.isfinite(losses).all()).float()
        own = torch.cat([losses, torch.stack([bad, torch.full_like(bad, float(stop))])])
        shared = self._accelerator.reduce(own, reduction="mean")
        copied = torch.cuda.Event() if shared.is_cuda else None  # type: ignore[no-untyped-call]
        shared = shared.to("cpu", non_blocking=True)
        if copied is not None:
            copied.record()
        self.drain()
        self._pending = _Pending(step, tuple(means), tuple(names), own, shared, copied)

    def stop_is_agreed(self, requested: bool) -> bool:
        """Whether some process was asked to stop by the last step; the same on all processes."""
        if self._accelerator.num_processes == 1:
            return requested
        return self._pending is not None and self._pending.read()[-1] > 0

    def drain(self) -> None:
        """Read the outcome of every step so far."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        *means, bad, _ = pending.read()
        if bad > 0:
            raise self._not_finite(pending)
        for name, mean in zip(pending.terms, means, strict=True):
            self._window.setdefault(name, []).append(mean)

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last call, by term; empty without steps."""
        means = {name: sum(values) / len(values) for name, values in self._window.items()}
        self._window = {}
        return means

    def _not_finite(self, pending: _Pending) -> TrainingError:
        own = pending.own.tolist()
        entry = (own[-2] > 0, pending.names, own[: len(pending.terms)])
        entries = gather([entry], self._accelerator)
        _, names, losses = next(entry for entry in entries if entry[0])
        terms = ", ".join(
            f"{term} = {loss:.4g}" for term, loss in zip(pending.terms, losses, strict=True)
        )
        return TrainingError(
            f"loss: expected finite terms, got {terms} in step {pending.step} for the images "
            f"{', '.join(names)}. Look at these images and their masks, or lower the learning "
            "rate."
        )


@dataclass(frozen=True)
class _Pending:
    """A step that was started."""

    step: int  # Its number, from 1
    terms: tuple[str, ...]  # Names of the loss terms
    names: tuple[str, ...]  # Names of this process's images
    own: Tensor  # This process's terms, whether one is not finite, whether to stop
    shared: Tensor  # Their means over processes, on their way to the CPU
    copied: torch.cuda.Event | None  # When they are there; None for at once

    def read(self) -> list[float]:
        """Wait for the means."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.shared.tolist()


_SECOND_INTERRUPT_SECONDS = 1.0


class StopRequest:
    """Whether a run was asked to stop.

    Attributes:
        requested: Whether to stop after the current step.
    """

    requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C, at least a second later, stops at once."""
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            return
        # A launcher repeats signals within milliseconds; only a person's second one counts.
        elapsed = time.monotonic() - self._requested_at
        if number == signal.SIGINT and elapsed > _SECOND_INTERRUPT_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs.

    Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request = StopRequest()
    on_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if on_main_thread else ()
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
