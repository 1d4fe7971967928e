"""Candidates take turns in random order, so that a busy moment meets all of them alike."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsseg_rt.errors import ArgumentError
from zsseg_rt.profiling.candidates import Candidate, CandidateError, LocalCandidate
from zsseg_rt.profiling.estimates import (
    MOST_PAIRS,
    Basis,
    Difference,
    choose_basis,
    judge,
)
from zsseg_rt.profiling.meter import (
    DeviceTimer,
    Paced,
    Sample,
    Stopwatch,
    Turn,
    TurnPlan,
    settle_threads,
    waiting_share,
)

_GROWTH = 1.25  # the interval is looked at after so many times more rounds
_PACED_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When enough rounds were taken: a rule that does not look at who is ahead.

    Attributes:
        max_seconds: No round begins later.
        min_rounds: Rounds before anything is looked at.
        max_rounds: Rounds at most.
        half_width: Stop once every candidate's interval against the first one reaches no further
            than this share from its estimate; None takes rounds until one of the others ends it.
    """

    max_seconds: float = 60.0
    min_rounds: int = 10
    max_rounds: int = MOST_PAIRS
    half_width: float | None = 0.01


@dataclass(kw_only=True)
class Rounds:
    """What candidates did, round by round.

    Attributes:
        turns: By candidate, one entry a round; None after it failed.
        failures: Why candidates failed, by name.
        waiting: Share of their runnable time that each candidate's threads waited for a CPU.
        seconds: How long it took.
        interrupted: Whether Ctrl-C ended it.
        on_gpu: Whether the first candidate ran on a GPU.
    """

    turns: dict[str, list[Turn | None]]
    failures: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    on_gpu: bool = False

    @property
    def count(self) -> int:
        """Rounds that were begun."""
        return max((len(turns) for turns in self.turns.values()), default=0)

    def warm(self, name: str) -> list[Sample]:
        """All warm calls of a candidate."""
        return [sample for turn in self.turns[name] if turn is not None for sample in turn.warm]

    def cold(self, name: str) -> list[Sample]:
        """All first calls after a pause."""
        found = (turn.cold for turn in self.turns[name] if turn is not None)
        return [sample for sample in found if sample is not None]

    def median_ms(self, name: str, *, cold: bool = False) -> float:
        """Median of a candidate's warm or cold calls, on a GPU of their time there."""
        samples = self.cold(name) if cold else self.warm(name)
        times = (s.wall_ms if s.device_ms is None else s.device_ms for s in samples)
        return statistics.median(times)

    def basis(self, first: str, second: str) -> Basis:
        """Which time two candidates are compared by; see :func:`choose_basis`."""
        shares = [self.waiting[name] for name in (first, second)]
        known = [share for share in shares if share is not None]
        return choose_basis(max(known) if known else None, on_gpu=self.on_gpu)

    def difference(self, first: str, second: str, threshold: float) -> Difference | None:
        """Compare two candidates over the rounds that both took part in; None if there are none."""
        basis = self.basis(first, second)
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
    """What a turn counts for: the median of its warm calls; of CPU time, which is coarse, the mean.

    Device times are wall times where a candidate has none.
    """
    if basis == "cpu":
        return statistics.fmean(sample.cpu_ms for sample in turn.warm)
    if basis == "device":
        times = (s.wall_ms if s.device_ms is None else s.device_ms for s in turn.warm)
        return statistics.median(times)
    return statistics.median(sample.wall_ms for sample in turn.warm)


def take_turns(
    candidates: Sequence[Candidate],
    plan: TurnPlan,
    stop: StopRule,
    *,
    seed: int = 0,
    on_round: Callable[[Rounds], None] | None = None,
) -> Rounds:
    """Let candidates take turns until the rule ends it.

    Returns:
        What was measured; also after Ctrl-C, and where candidates failed.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"candidates: expected distinct names, got {', '.join(names)}")
    rounds = Rounds(turns={name: [] for name in names}, on_gpu=candidates[0].on_gpu)
    before = {candidate.name: candidate.thread_times() for candidate in candidates}
    order, watch, look_at = random.Random(seed), Stopwatch(), stop.min_rounds
    try:
        while rounds.count < stop.max_rounds and watch.seconds < stop.max_seconds:
            if not _one_round(candidates, plan, rounds, order):
                break
            _note_waiting(candidates, before, rounds)
            if on_round is not None:
                on_round(rounds)
            if rounds.count >= look_at:
                look_at = max(look_at + 1, int(look_at * _GROWTH))
                if _is_narrow(rounds, names, stop.half_width):
                    break
    except KeyboardInterrupt:
        rounds.interrupted = True
    rounds.seconds = watch.seconds
    _note_waiting(candidates, before, rounds)
    return rounds


def _one_round(
    candidates: Sequence[Candidate],
    plan: TurnPlan,
    rounds: Rounds,
    order: random.Random,
) -> bool:
    """Let each candidate that still works take its turn; False if none does."""
    taken: dict[str, Turn] = {}
    alive = [one for one in candidates if one.name not in rounds.failures]
    for candidate in order.sample(alive, len(alive)):
        try:
            taken[candidate.name] = candidate.turn(plan)
        except CandidateError as exc:
            rounds.failures[candidate.name] = str(exc)
            continue
        candidate.settle()
    for name, turns in rounds.turns.items():
        turns.append(taken.get(name))
    return bool(taken)


def _note_waiting(candidates: Sequence[Candidate], before: Mapping[str, Any], to: Rounds) -> None:
    for candidate in candidates:
        if candidate.name not in to.failures:
            after = candidate.thread_times()
            to.waiting[candidate.name] = waiting_share(before[candidate.name], after)
        to.waiting.setdefault(candidate.name, None)


def _is_narrow(rounds: Rounds, names: Sequence[str], half_width: float | None) -> bool:
    if half_width is None or len(names) < 2:
        return False
    for name in names[1:]:
        if name in rounds.failures:
            continue
        found = rounds.difference(names[0], name, half_width)
        if found is None or found.low is None or found.high is None:
            return False
        if max(found.high - found.change, found.change - found.low) > half_width:
            return False
    return True


def pace_in_turns(
    candidates: Sequence[Candidate], *, rate: float, seconds: float, seed: int = 0
) -> dict[str, list[Paced]]:
    """Let frames fall due by a clock, for one candidate at a time, a few stretches each.

    Returns:
        Frames by candidate; those of a candidate that failed are left out.
    """
    order = random.Random(seed)
    frames: dict[str, list[Paced]] = {candidate.name: [] for candidate in candidates}
    for _ in range(_PACED_BLOCKS):
        for candidate in order.sample(list(candidates), len(candidates)):
            if candidate.name not in frames:
                continue
            try:
                frames[candidate.name] += candidate.pace(rate, seconds / _PACED_BLOCKS)
            except CandidateError:
                del frames[candidate.name]
                continue
            candidate.settle()
    return frames


def _stages_of(result: Any) -> Mapping[str, float]:
    """Stages of a segmentation; other results, such as a rival's labels, have none."""
    times: Mapping[str, float] = getattr(result, "times", {})
    return times


def take_turns_locally(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    plan: TurnPlan | None = None,
    stages: bool = False,
    device_timer: DeviceTimer | None = None,
    max_seconds: float = math.inf,
) -> Rounds:
    """Let functions of this process take turns: what benchmark scripts use."""
    plan = plan or TurnPlan(measuring_ms=0.0)
    stages_of = _stages_of if stages else None
    candidates = [
        LocalCandidate(name, call, device_timer=device_timer, stages_of=stages_of)
        for name, call in calls.items()
    ]
    for call in calls.values():
        call()  # allocators, code
    settle_threads()
    stop = StopRule(max_seconds=max_seconds, max_rounds=rounds, half_width=None)
    try:
        return take_turns(candidates, plan, stop)
    finally:
        for candidate in candidates:
            candidate.close()
