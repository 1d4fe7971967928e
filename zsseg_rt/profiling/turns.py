"""Candidates take turns in random order, so that a busy moment meets all of them alike."""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsseg_rt.common.child_process import ChildError, ChildProcess
from zsseg_rt.errors import ArgumentError, ZssegError
from zsseg_rt.profiling.estimates import MOST_PAIRS, Basis, Difference, choose_basis, judge
from zsseg_rt.profiling.worker import (
    LocalCandidate,
    Sample,
    Stopwatch,
    Turn,
    TurnPlan,
    read_memory_mb,
    settle_threads,
    waiting_share,
)

_WORKER = Path(__file__).with_name("worker.py")
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_GROWTH = 1.25  # the interval is looked at after so many times more rounds
_PACED_BLOCKS = 3


class CandidateError(ZssegError):
    """A candidate failed while it was opened or timed; the others go on."""


class ChildCandidate(LocalCandidate):
    """A process of its own: own threads, own peak memory, any interpreter.

    Attributes:
        memory: Resident MB after the first call and at the peak until then, or None.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], *, python: str | None = None) -> None:
        self.name = name
        try:
            self._child = ChildProcess(
                [python or sys.executable, str(_WORKER)], env=_environment(python)
            )
        except OSError as exc:
            raise CandidateError(
                f"{name}: cannot run {python}: {exc.strerror}. Check the interpreter's path."
            ) from exc
        self.process = self._child.number
        try:
            answer = self.request("open", spec=dict(spec))
        except BaseException:
            self.close()
            raise
        self.started, self.described = answer["started"], answer["described"]
        self.on_gpu = bool(answer["on_gpu"])
        self.memory: list[float] | None = answer["memory"]

    def request(self, action: str, **values: Any) -> Any:
        """Ask the child to do something and return its answer."""
        try:
            return self._child.request(action, **values)
        except ChildError as error:
            kind = f"{error.kind}: " if error.kind else ""
            raise CandidateError(f"{self.name}: {kind}{error}") from error

    def turn(self, plan: TurnPlan) -> Turn:
        """Take one turn."""
        answer = self.request("turn", plan=vars(plan))
        cold = None if answer["cold"] is None else Sample(**answer["cold"])
        return Turn(cold, tuple(Sample(**sample) for sample in answer["warm"]))

    def pace(self, rate: float, seconds: float) -> list[tuple[float, float]]:
        """Label frames that fall due by a clock."""
        return [(due, own) for due, own in self.request("pace", rate=rate, seconds=seconds)]

    def warm_up(self) -> float:
        """Make calls until caches and threads are warm; return the fastest one's milliseconds."""
        return float(self.request("warm_up"))

    def select(self, **values: Any) -> float:
        """Change what the calls of a function's candidate work on; seconds until a first result."""
        return float(self.request("select", **values))

    def save_labels(self, file: Path, index: int = 0) -> None:
        """Save labels of a frame as ``.npy``."""
        self.request("save_labels", file=str(file), index=index)

    def peak_memory_mb(self) -> float | None:
        """The largest resident memory of the child so far."""
        memory = read_memory_mb(self.process)
        return None if memory is None else memory[1]

    def close(self, *, at_once: bool = False) -> None:
        """End the child: by itself if it answers, else by force."""
        if at_once:
            self._child.kill()
        else:
            self._child.close()


def _environment(python: str | None) -> dict[str, str]:
    """This interpreter finds what this process finds; another one only its own packages."""
    if python is None:
        path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
        return {**os.environ, "PYTHONPATH": path}
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When enough rounds were taken: a rule that does not look at who is ahead."""

    max_seconds: float = 60.0  # no round begins later
    min_rounds: int = 10  # before anything is looked at
    max_rounds: int = MOST_PAIRS
    half_width: float | None = 0.01
    """Stop once every interval against the first reaches no further from its estimate."""


@dataclass(kw_only=True)
class Rounds:
    """The turns of candidates, round by round."""

    turns: dict[str, list[Turn | None]]  # by candidate, one entry a round; None after it failed
    failures: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, float | None] = field(default_factory=dict)
    """Share of their runnable time that each candidate's threads waited for a CPU."""
    seconds: float = 0.0
    interrupted: bool = False  # by Ctrl-C
    on_gpu: bool = False  # whether the first candidate was

    @property
    def count(self) -> int:
        """Rounds that were begun."""
        return max((len(turns) for turns in self.turns.values()), default=0)

    def warm(self, name: str) -> list[Sample]:
        """All warm calls of a candidate."""
        return [sample for turn in self.turns[name] if turn is not None for sample in turn.warm]

    def cold(self, name: str) -> list[Sample]:
        """All first calls after a pause."""
        return [turn.cold for turn in self.turns[name] if turn is not None and turn.cold]

    def median_ms(self, name: str, *, cold: bool = False) -> float:
        """Median of a candidate's warm or cold calls, on a GPU of their time there."""
        samples = self.cold(name) if cold else self.warm(name)
        return statistics.median(map(_device_ms, samples))

    def difference(self, first: str, second: str, threshold: float) -> Difference | None:
        """Compare two candidates over the rounds that both took part in; None if there are none."""
        shares = [self.waiting[name] or 0.0 for name in (first, second)]
        basis = choose_basis(max(shares), on_gpu=self.on_gpu)
        pairs = [
            (turn_ms(one, basis), turn_ms(other, basis))
            for one, other in zip(self.turns[first], self.turns[second], strict=False)
            if one is not None and other is not None
        ]
        pairs = [(one, other) for one, other in pairs if one > 0.0 and other > 0.0]
        if not pairs:
            return None
        base, others = zip(*pairs, strict=True)
        return judge(base, others, basis=basis, threshold=threshold)


def turn_ms(turn: Turn, basis: Basis) -> float:
    """Median of the warm calls; of CPU time, which is coarse, the mean."""
    if basis == "cpu":
        return statistics.fmean(sample.cpu_ms for sample in turn.warm)
    if basis == "device":
        return statistics.median(map(_device_ms, turn.warm))
    return statistics.median(sample.wall_ms for sample in turn.warm)


def _device_ms(sample: Sample) -> float:
    return sample.wall_ms if sample.device_ms is None else sample.device_ms


def take_turns(
    candidates: Sequence[LocalCandidate],
    plan: TurnPlan,
    stop: StopRule,
    *,
    seed: int = 0,
    on_round: Callable[[Rounds], None] | None = None,
) -> Rounds:
    """Let candidates take turns until the rule ends it, Ctrl-C does, or all have failed."""
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"candidates: expected distinct names, got {', '.join(names)}")
    rounds = Rounds(turns={name: [] for name in names}, on_gpu=candidates[0].on_gpu)
    before = {candidate.name: candidate.thread_times() for candidate in candidates}
    rounds.waiting = dict.fromkeys(names)
    order, watch, look_at = random.Random(seed), Stopwatch(), stop.min_rounds

    def note_waiting() -> None:
        for one in candidates:
            if one.name not in rounds.failures:
                rounds.waiting[one.name] = waiting_share(before[one.name], one.thread_times())

    try:
        while rounds.count < stop.max_rounds and watch.seconds < stop.max_seconds:
            alive = [one for one in candidates if one.name not in rounds.failures]
            if not alive:
                break
            turns: dict[str, Turn] = {}
            for candidate in order.sample(alive, len(alive)):
                try:
                    turns[candidate.name] = candidate.turn(plan)
                except CandidateError as exc:
                    rounds.failures[candidate.name] = str(exc)
                else:
                    candidate.settle()
            for name, earlier in rounds.turns.items():
                earlier.append(turns.get(name))
            note_waiting()
            if on_round is not None:
                on_round(rounds)
            if rounds.count >= look_at:
                look_at = max(look_at + 1, int(look_at * _GROWTH))
                if stop.half_width is not None and _is_narrow(rounds, names, stop.half_width):
                    break
    except KeyboardInterrupt:
        rounds.interrupted = True
    rounds.seconds = watch.seconds
    note_waiting()
    return rounds


def _is_narrow(rounds: Rounds, names: Sequence[str], half_width: float) -> bool:
    others = [name for name in names[1:] if name not in rounds.failures]
    differences = [rounds.difference(names[0], name, half_width) for name in others]
    return len(names) > 1 and all(
        one is not None
        and one.low is not None
        and one.high is not None
        and max(one.high - one.change, one.change - one.low) <= half_width
        for one in differences
    )


def pace_in_turns(
    candidates: Sequence[LocalCandidate], *, rate: float, seconds: float, seed: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """Frames that fall due by a clock, by candidate, a few stretches each; less what failed."""
    order = random.Random(seed)
    frames: dict[str, list[tuple[float, float]]] = {one.name: [] for one in candidates}
    for _ in range(_PACED_BLOCKS):
        for candidate in order.sample(list(candidates), len(candidates)):
            if candidate.name in frames:
                try:
                    frames[candidate.name] += candidate.pace(rate, seconds / _PACED_BLOCKS)
                    candidate.settle()
                except CandidateError:
                    del frames[candidate.name]
    return frames


def take_turns_locally(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    plan: TurnPlan | None = None,
    stages: bool = False,
    device_timer: Any = None,
    max_seconds: float = math.inf,
) -> Rounds:
    """Let functions of this process take turns: what benchmark scripts use."""
    plan = plan or TurnPlan(measuring_ms=0.0)
    stages_of = (lambda result: getattr(result, "times", {})) if stages else None  # rivals: none
    settings = {"device_timer": device_timer, "stages_of": stages_of}
    candidates = [LocalCandidate(name, call, **settings) for name, call in calls.items()]
    for call in calls.values():
        call()  # allocators, code
    settle_threads()
    stop = StopRule(max_seconds=max_seconds, max_rounds=rounds, half_width=None)
    return take_turns(candidates, plan, stop)
