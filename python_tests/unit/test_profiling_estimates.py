"""Percentiles, intervals and verdicts, compared with scipy on seeded data."""

import math

import numpy as np
import pytest
import scipy.stats

from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.profiling.estimates import (
    MOST_PAIRS,
    choose_basis,
    judge,
    percentile,
    percentile_interval,
    shift_estimate,
)


def skewed(count, seed=0):
    return [float(value) for value in np.random.default_rng(seed).lognormal(1.0, 0.6, count)]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("count", [61, 100, 1000])
def test_percentiles_are_samples_as_numpy_chooses_them(count, share):
    samples = skewed(count)
    expected = np.percentile(samples, 100 * share, method="inverted_cdf")
    assert percentile(samples, share) == expected


@pytest.mark.parametrize(
    ("share", "least"), [(0.5, 6), (0.9, 30), (0.95, 60), (0.99, 300)], ids=str
)
def test_a_percentile_needs_three_samples_above_it(share, least):
    samples = list(range(least))
    assert percentile(samples[:-1], share) is None
    assert percentile(samples, share) == samples[-4]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [20, 173, 2000])
def test_a_percentile_s_interval_is_between_binomial_order_statistics(count, share):
    ordered = sorted(skewed(count))
    below = scipy.stats.binom(count, share)
    low = max((k for k in range(count + 1) if below.cdf(k - 1) <= 0.025), default=0)
    high = min((k for k in range(count + 2) if below.sf(k - 1) <= 0.025), default=count + 1)
    found = percentile_interval(ordered[::-1], share)
    if low < 1 or high > count:
        assert found is None
    else:
        assert found == (ordered[low - 1], ordered[high - 1])


@pytest.mark.parametrize("count", [6, 7, 12, 25, 50])
def test_the_shift_s_interval_holds_what_an_exact_wilcoxon_test_does_not_refute(count):
    values = np.random.default_rng(count).normal(0.3, 1.0, count)
    found = shift_estimate([float(value) for value in values])

    def refuted(shift):
        return scipy.stats.wilcoxon(values - shift, method="exact").pvalue <= 0.05

    nudge = 1e-9
    assert not refuted(found.low + nudge)
    assert not refuted(found.high - nudge)
    assert refuted(found.low - nudge)
    assert refuted(found.high + nudge)
    pairs = [(a + b) / 2 for i, a in enumerate(values) for b in values[i:]]
    assert found.value == pytest.approx(np.median(pairs), abs=1e-12)


@pytest.mark.parametrize("count", [51, 200, 700])
def test_a_large_sample_s_interval_holds_what_the_approximate_test_does_not_refute(count):
    values = np.random.default_rng(count).normal(0.3, 1.0, count)
    found = shift_estimate([float(value) for value in values])

    def chance(shift):
        return scipy.stats.wilcoxon(values - shift, method="approx", correction=True).pvalue

    slack = 0.5 / math.sqrt(count)  # a tenth of the interval's width
    assert chance(found.low + slack) > 0.05 > chance(found.low - slack)
    assert chance(found.high - slack) > 0.05 > chance(found.high + slack)


def test_a_handful_of_rounds_has_no_interval():
    found = shift_estimate([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (found.value, found.low, found.high) == (pytest.approx(0.3), None, None)
    assert judge([1.0] * 5, [2.0] * 5, basis="wall", threshold=0.02).verdict == "undecided"


def test_more_rounds_than_pairs_can_be_sorted_are_thinned_evenly():
    values = [float(index) for index in range(3 * MOST_PAIRS)]
    assert shift_estimate(values).value == pytest.approx(np.median(values), rel=1e-3)


@pytest.mark.parametrize(
    ("waiting", "on_gpu", "basis"),
    [
        (None, False, "wall"),
        (0.0, False, "wall"),
        (0.2, False, "wall"),
        (0.21, False, "cpu"),
        (0.74, True, "device"),
        (0.1, True, "wall"),
    ],
)
def test_wall_time_is_compared_unless_threads_waited(waiting, on_gpu, basis):
    assert choose_basis(waiting, on_gpu=on_gpu) == basis


def rounds(change, spread, count=100, seed=0):
    """Times whose ratio is a change, give or take a spread, on a machine that varies by half."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(5.0, 10.0, count)
    other = base * (1.0 + change) * np.exp(generator.normal(0.0, spread, count))
    return [float(value) for value in base], [float(value) for value in other]


@pytest.mark.parametrize(
    ("change", "spread", "verdict"),
    [
        (0.10, 0.05, "slower"),
        (-0.10, 0.05, "faster"),
        (0.0, 0.02, "equal"),
        (0.01, 0.01, "equal"),
        (0.02, 0.05, "undecided"),
        (0.0, 0.5, "undecided"),
    ],
)
def test_verdicts(change, spread, verdict):
    base, other = rounds(change, spread)
    found = judge(base, other, basis="wall", threshold=0.02)
    assert found.verdict == verdict
    assert found.low < found.change < found.high
    assert (found.rounds_needed is None) or verdict == "undecided"


def test_an_undecided_verdict_names_enough_rounds_to_be_decided():
    base, other = rounds(0.06, 0.3, seed=1)
    found = judge(base, other, basis="wall", threshold=0.02)
    assert found.verdict == "undecided"
    decided = 0
    for seed in range(20):
        again = judge(*rounds(found.change, 0.3, 3 * found.rounds_needed, seed),
                      basis="wall", threshold=0.02)  # fmt: skip
        decided += again.verdict != "undecided"
    assert decided >= 15


def test_swapping_candidates_swaps_the_verdict():
    base, other = rounds(0.1, 0.05)
    forth = judge(base, other, basis="cpu", threshold=0.02)
    back = judge(other, base, basis="cpu", threshold=0.02)
    assert (forth.verdict, back.verdict) == ("slower", "faster")
    assert (1 + forth.change) * (1 + back.change) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("base", "other", "problem"),
    [([], [], "rounds"), ([1.0], [1.0, 2.0], "rounds"), ([1.0], [0.0], "times")],
)
def test_what_cannot_be_compared_is_refused(base, other, problem):
    with refused(ArgumentError, problem):
        judge(base, other, basis="wall", threshold=0.02)
