"""Open rivals, each in a process of its own, check their results, and let them take turns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rivals.cases import (
    OURS,
    RIVALS,
    Case,
    Model,
    Rival,
    is_installed,
    missing_needs,
    refused_memory,
)
from rivals.models import Stored
from rivals.report import CaseResult, RivalResult
from zsseg_rt.profiling.turns import CandidateError, ChildCandidate, Rounds, StopRule, take_turns
from zsseg_rt.profiling.worker import TurnPlan

_CHILD = Path(__file__).with_name("child.py")
THRESHOLD = 0.02
LONG_CALL_MS = 100.0
_FEWEST_TURNS = 12  # what a rival must fit into a case's time, unless it keeps up with ours
_KEEPS_UP = 4.0
_SHARES: dict[Model, float] = {"real": 1.0, "demo": 1 / 3, "": 1 / 2}  # of a case's time
LEAST_EQUAL = {"float32": 0.99, "uint8": 0.999}
"""Least share of equal pixels by precision: OpenCV rounds the resized frame, and near ties turn."""
_LEAST_EQUAL_LOWER = 0.9


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        seconds: Of turns for a case with the real model; others take a half or a third.
        short: Whether only rivals take part that do so in short runs.
        scratch: Folder for results that are compared.
        installed: Tells whether a rival's need is there.
        say: Prints progress.
    """

    seconds: float
    short: bool
    scratch: Path
    installed: Callable[[str], bool] = is_installed
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


def measure_cases(
    cases: Sequence[Case], stored: Callable[[str], Stored], settings: Settings
) -> Iterator[CaseResult]:
    """Measure cases; those of one task, model and number of threads share their processes.

    Args:
        cases: Distinct cases.
        stored: Returns a model's files.
        settings: How.
    """
    ordered = sorted(cases, key=lambda case: (case.task, case.model, case.threads))
    for _, group in itertools.groupby(ordered, lambda c: (c.task, c.model, c.threads)):
        together = list(group)
        session = Session(together[0], stored, settings)
        try:
            for case in together:
                settings.say(str(case))
                yield session.measure(case)
        finally:
            session.close()


class Session:
    """The rivals of one task, model and number of threads."""

    def __init__(self, first: Case, stored: Callable[[str], Stored], settings: Settings) -> None:
        self._settings, self._first = settings, first
        self._rivals = {rival.name: rival for rival in RIVALS[first.task]}
        files = stored(first.model) if first.model else None
        with ThreadPoolExecutor(2 if settings.short else 1) as pool:
            opened = list(
                pool.map(lambda rival: self._open(rival, first, files), self._rivals.values())
            )
        self._children = {c.name: c for c in opened if isinstance(c, ChildCandidate)}
        self._unopened = [entry for entry in opened if isinstance(entry, RivalResult)]
        self._ours = [name for name in self._children if name in OURS]
        if not self._ours:
            self.close()
            raise CandidateError(f"{self._unopened[0].name}: {self._unopened[0].note}")

    def close(self) -> None:
        """End all processes."""
        for child in self._children.values():
            child.close()

    def measure(self, case: Case) -> CaseResult:
        """Check and time the rivals in one case."""
        results, quick_enough, fastest = dict[str, RivalResult](), [], 1e9
        truth: Any = None
        for name, child in list(self._children.items()):
            try:
                entry = self._prepare(name, child, case)
                if not entry.note:
                    entry, pixels = self._check(entry, child, truth)
                    truth = pixels if truth is None else truth
            except CandidateError as exc:
                self._children.pop(name).close()
                entry = RivalResult(name=name, note=f"failed: {exc}")
                self._unopened.append(entry)
            if entry.ms is not None and not entry.note:
                fastest = min(fastest, entry.ms)
                entry = self._leave_slow_out(entry, results.get(self._ours[0]), case)
            if not entry.note:
                quick_enough.append(child)
            results[name] = entry
        if not quick_enough or quick_enough[0].name != self._ours[0]:
            first = results[self._ours[0]]
            raise CandidateError(f"{first.name}: cannot be compared with: {first.note}")
        plan = TurnPlan(cold=fastest < LONG_CALL_MS)
        stop = StopRule(max_seconds=self._seconds(case), max_rounds=200, half_width=THRESHOLD / 2)
        rounds = take_turns(quick_enough, plan, stop)
        if rounds.interrupted:
            raise KeyboardInterrupt
        rivals = {entry.name: self._finish(entry, rounds) for entry in results.values()}
        rivals |= {one.name: one for one in self._unopened if one.name not in results}
        return CaseResult(
            **vars(case),
            rounds=rounds.count,
            seconds=rounds.seconds,
            rivals=tuple(rivals[name] for name in self._rivals if name in rivals),
        )

    def _open(
        self, rival: Rival, case: Case, files: Stored | None
    ) -> ChildCandidate | RivalResult | None:
        """A rival's process, or why there is none; None where it would be the same as another."""
        if missing := missing_needs(rival, self._settings.installed):
            return RivalResult(name=rival.name, note=f"missing: {', '.join(missing)}")
        if self._settings.short and not rival.short_runs:
            return RivalResult(name=rival.name, note="left out of short runs")
        arguments = {**rival.arguments, "threads": case.threads}
        if files is not None:
            arguments["bundle"] = str(files.bundle)
            if rival.kind == "torch":
                arguments["torch_file"] = str(files.torch_file)
        options = {"kind": rival.kind, "classes": case.classes, "out_hw": case.out_hw}
        options |= {"arguments": arguments}
        spec: dict[str, Any] = {"file": str(_CHILD), "function": "open_rival"}
        try:
            child = ChildCandidate(rival.name, spec | {"arguments": options})
        except CandidateError as exc:
            return RivalResult(name=rival.name, note=f"failed: {exc}")
        if rival.name.endswith(" auto") and child.described["precision"] == "float32":
            child.close()  # this CPU has nothing faster
            return None
        return child

    def _prepare(self, name: str, child: ChildCandidate, case: Case) -> RivalResult:
        """Select the case, call twice, and note the second call's time."""
        entry = RivalResult(
            name=name,
            precision=child.described["precision"],
            labelled_by=child.described["labelled by"],
            load_s=child.started["load_s"],
        )
        if reason := refused_memory(self._rivals[name], case, available_bytes()):
            return replace(entry, note=reason)
        first_s = child.select(classes=case.classes, out_hw=case.out_hw)
        if case == self._first:
            first_s = child.started["first_frame_s"]  # with what only a first call does
        called = child.turn(TurnPlan(pause_ms=0.0, cold=False, measuring_ms=0.0)).warm[0]
        child.settle()
        peak_mb = child.peak_memory_mb()
        return replace(entry, first_s=first_s, ms=called.wall_ms, peak_mb=peak_mb)

    def _check(
        self, entry: RivalResult, child: ChildCandidate, truth: Any
    ) -> tuple[RivalResult, Any]:
        """Compare its result with ours."""
        file = self._settings.scratch / "pixels.npy"
        child.save_labels(file)
        pixels = np.load(file)
        share = 1.0 if truth is None else equal_share(pixels, truth)
        least = LEAST_EQUAL.get(entry.precision, _LEAST_EQUAL_LOWER)
        note = "" if share >= least else f"wrong: only {share:.2%} of the pixels are equal"
        entry = replace(entry, equal_share=share, note=note)
        return (replace(entry, ms=None) if note else entry), pixels

    def _leave_slow_out(
        self, entry: RivalResult, ours: RivalResult | None, case: Case
    ) -> RivalResult:
        """A rival that would take all the time keeps the one call that was timed."""
        assert entry.ms is not None
        limit = 1e3 * self._seconds(case) / _FEWEST_TURNS
        if ours is None or ours.ms is None or entry.ms <= max(limit, _KEEPS_UP * ours.ms):
            return entry
        return replace(entry, note="one call only: too slow for more")

    def _finish(self, entry: RivalResult, rounds: Rounds) -> RivalResult:
        if entry.name not in rounds.turns:
            return entry
        if entry.name in rounds.failures:
            return replace(entry, ms=None, note=f"failed: {rounds.failures[entry.name]}")
        warm, base = rounds.warm(entry.name), self._base(entry, rounds)
        return replace(
            entry,
            ms=rounds.median_ms(entry.name),
            cold_ms=rounds.median_ms(entry.name, cold=True) if rounds.cold(entry.name) else None,
            cpu_ms=fmean(sample.cpu_ms for sample in warm),
            waiting=rounds.waiting[entry.name],
            compared_with=base,
            difference=rounds.difference(base, entry.name, THRESHOLD) if base else None,
        )

    def _base(self, entry: RivalResult, rounds: Rounds) -> str:
        """Ours of the same precision; none for ours."""
        if entry.name in self._ours:
            return "" if entry.name == self._ours[0] else self._ours[0]
        taking_part = [name for name in self._ours if name not in rounds.failures]
        same = [
            name
            for name in taking_part
            if name in rounds.turns
            and self._children[name].described["precision"] == entry.precision
        ]
        return same[0] if same else self._ours[0]

    def _seconds(self, case: Case) -> float:
        return self._settings.seconds * _SHARES[case.model]


def equal_share(pixels: Any, truth: Any) -> float:
    """Share of equal labels; of pictures, share of pixels that differ by at most 1."""
    if pixels.shape != truth.shape:
        return 0.0
    if pixels.ndim == 2:
        return float(np.mean(pixels == truth))
    return float(np.mean(np.abs(pixels.astype(np.int16) - truth).max(axis=2) <= 1))


def available_bytes(file: Path = Path("/proc/meminfo")) -> int:
    """Memory that programs can still get."""
    lines = dict(line.split(":") for line in file.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024
