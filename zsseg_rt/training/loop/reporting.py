"""What a run reports: TensorBoard, a history in JSON lines, terminal progress, timings."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.files import write_whole

HISTORY_FILE = "history.jsonl"
_PARTS = ("start", "data", "step", "report", "checkpoint", "evaluation")
Picture = tuple[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where a run's time went, in seconds of the main process.

    Attributes:
        start_seconds: Waiting for the first batch: starting the processes that read images.
        data_seconds: Waiting for images and copying them to the device.
        step_seconds: Forward, backward, optimizer; waiting for the device to finish them.
        report_seconds: Checks, history, TensorBoard, progress.
        checkpoint_seconds: Saving.
        evaluation_seconds: Evaluation and prediction images.
        steps: Optimizer steps measured.
        pictures: Images trained on, over all processes.
    """

    start_seconds: float = 0.0
    data_seconds: float = 0.0
    step_seconds: float = 0.0
    report_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    steps: int = 0
    pictures: int = 0

    @property
    def training_seconds(self) -> float:
        """Time of the steps with everything around them, except checkpoints and evaluation."""
        return self.data_seconds + self.step_seconds + self.report_seconds

    @property
    def overhead_share(self) -> float:
        """Share of the training time that is not the model's step, 0..1."""
        total = self.training_seconds
        return (self.data_seconds + self.report_seconds) / total if total else 0.0

    @property
    def pictures_per_second(self) -> float:
        """Images trained on per second, without checkpoints and evaluation."""
        return self.pictures / self.training_seconds if self.training_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """Everything as plain data, for the run's summary."""
        return vars(self) | {
            "overhead_share": self.overhead_share,
            "pictures_per_second": self.pictures_per_second,
        }


class StepClock:
    """Adds up where time goes; the parts do not overlap."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self.steps = 0
        self.pictures = 0

    def count_step(self, pictures: int) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self.pictures += pictures

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the block as one of the parts of :class:`Timing`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - started

    def timing(self) -> Timing:
        """What was measured so far."""
        seconds = {f"{part}_seconds": value for part, value in self._seconds.items()}
        return Timing(**seconds, steps=self.steps, pictures=self.pictures)


@dataclass
class _Progress:
    """A progress bar on a terminal; an occasional line elsewhere."""

    console: Console
    total: int
    bar: Progress | None = None
    task: TaskID | None = None
    started: float = field(default_factory=time.monotonic)
    first_step: int = 0

    def start(self, step: int) -> None:
        self.started, self.first_step = time.monotonic(), step
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, *times, console=self.console)
            self.task = self.bar.add_task("training", total=self.total, completed=step, text="")
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step)

    def say(self, step: int, text: str) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        done = step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (self.total - step)
        hours, minutes = divmod(round(left / 60), 60)
        line = f"step {step}/{self.total}  {text}  {hours}:{minutes:02d} h left"
        self.console.print(line, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class RunReport:
    """Writes a run's scalars and images; writes nothing on processes other than the main one."""

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total: int,
        active: bool = True,
        console: Console | None = None,
    ) -> None:
        self.active, self._folder, self._first_step = active, folder, first_step
        self._progress = _Progress(console or Console(stderr=True, markup=False), total)
        self._writer: Any = None

    def __enter__(self) -> RunReport:
        if self.active:
            self._folder.mkdir(parents=True, exist_ok=True)
            drop_later_lines(self._folder / HISTORY_FILE, self._first_step)
            self._writer = _summary_writer(self._folder / "tensorboard", self._first_step + 1)
            self._progress.start(self._first_step)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.active:
            self._progress.stop()
            self._writer.close()

    def advance(self, step: int) -> None:
        """Show that a step is done."""
        if self.active:
            self._progress.advance(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step to the history and to TensorBoard."""
        if not self.active:
            return
        with (self._folder / HISTORY_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if "loss/total" in values:
            self._progress.say(step, f"loss {values['loss/total']:.4g}")

    def pictures(self, step: int, pictures: Iterable[Picture]) -> None:
        """Show images, uint8 ``[H, W, 3]`` RGB with their names, in TensorBoard."""
        if self.active:
            for name, picture in pictures:
                self._writer.add_image(f"predictions/{name}", picture, step, dataformats="HWC")

    def summary(self, content: Mapping[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all."""
        if self.active:
            text = json.dumps(content, indent=1, ensure_ascii=False)
            write_whole(self._folder / "summary.json", (text + "\n").encode())


def drop_later_lines(path: Path, last_step: int) -> None:
    """Drop the lines of a history that are later than a step, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except ValueError:
            break
    write_whole(path, "".join(f"{line}\n" for line in kept).encode())


def _summary_writer(folder: Path, purge_step: int) -> Any:
    with needs_extra("train", "for training"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=purge_step)
