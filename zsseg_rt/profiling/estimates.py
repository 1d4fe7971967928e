"""Percentiles, their intervals, and the verdict on two candidates that took turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError

Basis = Literal["wall", "cpu", "device"]
Verdict = Literal["slower", "faster", "equal", "undecided"]
Floats = npt.NDArray[np.float64]

WAITING_LIMIT = 0.2
"""Share of their runnable time that threads may wait for a CPU before wall time is not compared."""
MOST_PAIRS = 2000
"""Rounds that an estimate uses at most; it sorts half of their square."""
_SAMPLES_ABOVE = 3
_LARGEST_EXACT = 50  # rounds up to which the rank's distribution is counted, not approximated
_MOST_ROUNDS_NAMED = 100_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval; the ends are None with too few samples for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much longer one candidate takes than another, as a share: 0.1 is 10 % longer."""

    basis: Basis  # the time that was compared; device: between CUDA events
    change: float  # Hodges-Lehmann estimate of the ratio of their times, less 1
    low: float | None  # ends of its 95 % interval; None with under 6 rounds
    high: float | None
    rounds: int  # that both took part in
    threshold: float  # changes up to this share count as equal
    verdict: Verdict
    """Slower or faster if the whole interval is beyond the threshold, equal if it is within."""
    rounds_needed: int | None
    """After which an undecided one can be expected to be decided; None: decided, or too near."""


def percentile(samples: Sequence[float], share: float) -> float | None:
    """The smallest sample that at least a share of all samples do not exceed."""
    rank = math.ceil(share * len(samples) - 1e-9)
    if len(samples) - rank < _SAMPLES_ABOVE:
        return None
    return float(np.partition(np.asarray(samples, np.float64), rank - 1)[rank - 1])


def percentile_interval(
    samples: Sequence[float], share: float, confidence: float = 0.95
) -> tuple[float, float] | None:
    """The interval for a percentile between two order statistics; assumes nothing of the shape."""
    count, tail = len(samples), (1.0 - confidence) / 2.0
    at_most = np.cumsum(_binomial(count, share))  # [k]: P(samples up to the percentile <= k)
    low = int(np.searchsorted(at_most, tail, side="right"))  # the largest with P(B < low) <= tail
    high = int(np.searchsorted(at_most, 1.0 - tail)) + 1
    if low < 1 or high > count:
        return None
    ordered = np.sort(np.asarray(samples, np.float64))
    return float(ordered[low - 1]), float(ordered[high - 1])


def _binomial(count: int, share: float) -> Floats:
    """Probabilities of 0 to ``count`` successes."""
    k = np.arange(count + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_choose = log_factorial[count] - log_factorial[k] - log_factorial[count - k]
    return np.asarray(np.exp(log_choose + k * math.log(share) + (count - k) * math.log1p(-share)))


def shift_estimate(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The Hodges-Lehmann median of values; its interval is of Wilcoxon's signed-rank test."""
    ordered = np.asarray(values, np.float64)
    if not ordered.size:
        raise ArgumentError("values: expected at least one, got none")
    if ordered.size > MOST_PAIRS:
        ordered = ordered[np.linspace(0, ordered.size - 1, MOST_PAIRS).astype(int)]
    ordered = np.sort(ordered)
    pairs = np.concatenate([(ordered[i] + ordered[i:]) / 2.0 for i in range(ordered.size)])
    pairs.sort()
    rank = _lower_rank(ordered.size, (1.0 - confidence) / 2.0)
    ends = (None, None) if rank < 1 else (float(pairs[rank - 1]), float(pairs[-rank]))
    return Interval(value=float(np.median(pairs)), low=ends[0], high=ends[1])


def _lower_rank(count: int, tail: float) -> int:
    """The largest k for which the signed-rank sum is below k with at most that probability."""
    if count <= _LARGEST_EXACT:
        below = np.cumsum(_signed_rank(count))
        return int(np.searchsorted(below, tail, side="right"))
    mean = count * (count + 1) / 4.0
    deviation = math.sqrt(count * (count + 1) * (2 * count + 1) / 24.0)
    return math.floor(mean + 0.5 + deviation * NormalDist().inv_cdf(tail))


def _signed_rank(count: int) -> Floats:
    """Probabilities of the sums 0 to n(n+1)/2 of ranks that are each taken with probability 1/2."""
    probabilities = np.zeros(count * (count + 1) // 2 + 1)
    probabilities[0] = 1.0
    for rank in range(1, count + 1):
        with_rank = np.zeros_like(probabilities)
        with_rank[rank:] = probabilities[:-rank]
        probabilities = (probabilities + with_rank) / 2.0
    return probabilities


def choose_basis(waiting_share: float | None, *, on_gpu: bool = False) -> Basis:
    """Which time is compared: a rule that is fixed before anything is measured."""
    if waiting_share is None or waiting_share <= WAITING_LIMIT:
        return "wall"
    return "device" if on_gpu else "cpu"


def judge(
    base: Sequence[float], other: Sequence[float], *, basis: Basis, threshold: float
) -> Difference:
    """Compare two candidates that took turns."""
    if not base or len(base) != len(other):
        raise ArgumentError(f"rounds: expected as many of both, got {len(base)} and {len(other)}")
    if min(*base, *other) <= 0.0:
        raise ArgumentError("times: expected positive milliseconds, got one that is not")
    ratios = np.log(np.asarray(other, np.float64)) - np.log(np.asarray(base, np.float64))
    shift = shift_estimate([float(ratio) for ratio in ratios])
    verdict = _verdict(shift, threshold)
    return Difference(
        basis=basis,
        change=math.expm1(shift.value),
        low=None if shift.low is None else math.expm1(shift.low),
        high=None if shift.high is None else math.expm1(shift.high),
        rounds=len(base),
        threshold=threshold,
        verdict=verdict,
        rounds_needed=_rounds_needed(shift, len(base), threshold)
        if verdict == "undecided"
        else None,
    )


def _verdict(shift: Interval, threshold: float) -> Verdict:
    """Both thresholds are ratios that undo each other: 1 + t and 1 / (1 + t)."""
    limit = math.log1p(threshold)
    if shift.low is None or shift.high is None:
        return "undecided"
    if shift.low > limit:
        return "slower"
    if shift.high < -limit:
        return "faster"
    return "equal" if -limit < shift.low and shift.high < limit else "undecided"


def _rounds_needed(shift: Interval, rounds: int, threshold: float) -> int | None:
    """An interval shrinks with the root of the rounds; it must not reach the nearer threshold."""
    if shift.low is None or shift.high is None:
        return 6
    limit = math.log1p(threshold)
    room = min(abs(shift.value - limit), abs(shift.value + limit))
    reach = max(shift.high - shift.value, shift.value - shift.low)
    if room <= 0.0 or rounds * (reach / room) ** 2 > _MOST_ROUNDS_NAMED:
        return None
    return max(rounds + 1, math.ceil(rounds * (reach / room) ** 2))
