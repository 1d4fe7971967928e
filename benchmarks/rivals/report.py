"""The results of a run, as data: written and read strictly."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from rivals.cases import Model, Task
from zsseg_rt.common import schema
from zsseg_rt.errors import ArgumentError
from zsseg_rt.profiling.conditions import Conditions
from zsseg_rt.profiling.estimates import WAITING_LIMIT, Difference

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RivalResult:
    """One rival in one case.

    Attributes:
        name: The rival.
        precision: What its network ran at; of a picture, what its values are.
        labelled_by: How logits became labels, or labels a picture.
        ms: Median wall time of a call; None if it was not timed, and ``note`` says why.
        cold_ms: The same of calls after a pause in which others ran; None where there were none.
        cpu_ms: Mean CPU time of all its threads during a call.
        waiting: Share of the time in which its threads could have run that they waited for a CPU.
        peak_mb: Largest resident memory of its process in this case.
        load_s: Seconds for imports and loading, its own compilation apart.
        first_s: Seconds from naming the classes and the size to the first result.
        equal_share: Share of pixels that are equal to those of ``compared_with``'s task's first
            rival, ours; of pictures, within 1 in every channel.
        compared_with: Which of our rivals the difference is to: the one of the same precision.
        difference: How much longer it takes.
        note: What is to be said about it; empty if nothing.
    """

    name: str
    precision: str = ""
    labelled_by: str = ""
    ms: float | None = None
    cold_ms: float | None = None
    cpu_ms: float | None = None
    waiting: float | None = None
    peak_mb: float | None = None
    load_s: float | None = None
    first_s: float | None = None
    equal_share: float | None = None
    compared_with: str = ""
    difference: Difference | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case; see :class:`rivals.cases.Case` for the first five."""

    task: Task
    model: Model
    classes: int
    out_hw: tuple[int, int]
    threads: int
    rounds: int
    seconds: float
    rivals: tuple[RivalResult, ...]


@dataclass(frozen=True, kw_only=True)
class Absent:
    """Rivals that could not run, what they need, and the command that installs it."""

    rivals: tuple[str, ...]
    need: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        format: Of this file.
        commit: Of the checkout.
        command: That repeats it.
        groups: Which groups were measured.
        machine: Processor, system and versions.
        conditions: What the machine did meanwhile.
        seconds: How long it took.
        absent: Rivals that were missing.
        cases: What was measured.
    """

    format: int
    commit: str
    command: str
    groups: tuple[str, ...]
    machine: dict[str, str]
    conditions: Conditions
    seconds: float
    absent: tuple[Absent, ...]
    cases: tuple[CaseResult, ...]

    @property
    def wrong(self) -> tuple[str, ...]:
        """Rivals with wrong results, with their cases."""
        return tuple(
            f"{case.task}, {case.classes} classes, {case.out_hw}: {rival.name}: {rival.note}"
            for case in self.cases
            for rival in case.rivals
            if rival.note.startswith("wrong")
        )

    @property
    def waiting(self) -> float | None:
        """Share of their time that our threads waited for a CPU, the median case's.

        Not the worst: threads of calls under a millisecond wait for one another, as quiet as the
        machine may be.
        """
        shares = [case.rivals[0].waiting for case in self.cases]
        values = [share for share in shares if share is not None]
        return statistics.median(values) if values else None

    @property
    def busy(self) -> bool:
        """Whether other programs took so much that the times say little."""
        return self.waiting is not None and self.waiting > WAITING_LIMIT


def write_report(report: Report, file: Path) -> None:
    """Write it as JSON."""
    file.write_text(json.dumps(schema.encode(report), indent=1) + "\n", encoding="utf-8")


def read_report(file: Path) -> Report:
    """Read what :func:`write_report` wrote.

    Raises:
        ArgumentError: The file cannot be read, or is not such a report.
    """
    try:
        raw = schema.parse_json(file.read_bytes())
    except (OSError, ValueError) as exc:
        raise ArgumentError(f"{file}: expected a report of benchmarks/run.py, got {exc}") from exc
    report = schema.decode(Report, raw, file.name, ArgumentError)
    if report.format != FORMAT:
        raise ArgumentError(
            f"{file}: expected a report of format {FORMAT}, got {report.format}. Measure again."
        )
    return report
