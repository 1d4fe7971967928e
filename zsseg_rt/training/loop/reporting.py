"""Reports of a run: TensorBoard, a history in JSON lines, terminal progress, timings."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import ArgumentError, CheckpointError

NamedImage = tuple[str, npt.NDArray[np.uint8]]


@dataclass(kw_only=True)
class Timing:
    """Where a run's time went, in seconds of the main process; the parts do not overlap."""

    # Waiting for the first batch: starting the processes that read images
    start_seconds: float = 0.0
    data_seconds: float = 0.0  # Waiting for images and copying them to the device
    step_seconds: float = 0.0  # Forward, backward, optimizer; waiting for the device to finish them
    report_seconds: float = 0.0  # Checks, history, TensorBoard, progress
    checkpoint_seconds: float = 0.0  # Saving
    evaluation_seconds: float = 0.0  # Evaluation and prediction images
    steps: int = 0  # Optimizer steps measured
    pictures: int = 0  # Images trained on, over all processes

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to one of the parts."""
        name, started = f"{part}_seconds", time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    @property
    def _training_seconds(self) -> float:
        return self.data_seconds + self.step_seconds + self.report_seconds

    @property
    def overhead_share(self) -> float:
        """Share of the time of steps, of 1, that is not the model's; without saving and judging."""
        total = self._training_seconds
        return (self.data_seconds + self.report_seconds) / total if total else 0.0

    @property
    def pictures_per_second(self) -> float:
        """Images trained on per second, without checkpoints and evaluation."""
        return self.pictures / self._training_seconds if self._training_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """Everything as plain data, for the run's summary."""
        shares = ("overhead_share", "pictures_per_second")
        return vars(self) | {name: getattr(self, name) for name in shares}


class RunReport:
    """Writes a run's scalars and images; writes nothing on processes other than the main one."""

    def __init__(self, folder: Path, *, first_step: int, total: int, active: bool = True) -> None:
        self.active, self._folder = active, folder
        self._first_step, self._total = first_step, total
        self._writer: Any = None

    def __enter__(self) -> RunReport:
        if not self.active:
            return self
        with needs_extra("train", "for training"):
            from torch.utils.tensorboard import SummaryWriter
        self._folder.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(self._folder / "history.jsonl", self._first_step)
        events = str(self._folder / "tensorboard")
        self._writer = SummaryWriter(events, purge_step=self._first_step + 1)
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.active:
            self._writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step to the history and to TensorBoard."""
        if not self.active:
            return
        with (self._folder / "history.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if "loss/total" in values:
            per_step = (time.monotonic() - self._started) / max(step - self._first_step, 1)
            hours, minutes = divmod(round(per_step * (self._total - step) / 60), 60)
            loss, left = f"loss {values['loss/total']:.4g}", f"{hours}:{minutes:02d} h left"
            sys.stderr.write(f"step {step}/{self._total}  {loss}  {left}\n")

    def images(self, step: int, images: Iterable[NamedImage]) -> None:
        """Show images, uint8 ``[H, W, 3]`` RGB with their names, in TensorBoard."""
        for name, image in images if self.active else ():
            self._writer.add_image(f"predictions/{name}", image, step, dataformats="HWC")

    def summary(self, content: Mapping[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all."""
        if self.active:
            text = json.dumps(content, indent=1, ensure_ascii=False)
            write_whole(self._folder / "summary.json", (text + "\n").encode())


def _drop_later_lines(path: Path, last_step: int) -> None:
    """Drop the lines of a history that are later than a step, and a torn last line."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                lines.append(line)
        except ValueError:
            break
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


class EvaluationLog:
    """``RUN/evaluations.json``: figures by step up to the last one, and which of them decides.

    That is the figure that decided in the run where none is named.
    """

    def __init__(self, folder: Path, best_metric: str = "", last_step: float = math.inf) -> None:
        self._path, self._metric = folder / "evaluations.json", best_metric
        self._entries: dict[int, dict[str, float]] = {}
        if not self._path.is_file():
            return
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            self._metric = best_metric or str(raw["best_metric"])
            for step, figures in raw["evaluations"].items():
                if int(step) <= last_step:
                    self._entries[int(step)] = {name: float(x) for name, x in figures.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path}: expected figures by step, got a damaged file. Remove it."
            ) from error

    def of(self, step: int) -> dict[str, float]:
        """The figures of a step; empty if it was not evaluated."""
        return self._entries.get(step, {})

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add figures that are numbers; the file has either the old content or the new."""
        if self._metric not in metrics:
            raise ArgumentError(
                f"best_metric: expected one of {', '.join(metrics)}, got {self._metric!r}. "
                "Set loop.best_metric."
            )
        self._entries[step] = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        content = {
            "best_metric": self._metric,
            "evaluations": {str(s): figures for s, figures in sorted(self._entries.items())},
        }
        write_whole(self._path, (json.dumps(content, indent=1) + "\n").encode())

    @property
    def best_step(self) -> int | None:
        """The step with the best figure, the first of equals; None if there is none."""
        figures = {step: m[self._metric] for step, m in self._entries.items() if self._metric in m}
        return max(sorted(figures), key=lambda step: figures[step]) if figures else None
