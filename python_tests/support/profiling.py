"""Candidates whose times are given, and functions for candidates that are processes."""

from __future__ import annotations

import itertools
import os
import signal

from zsseg_rt.profiling.turns import CandidateError
from zsseg_rt.profiling.worker import Sample, ThreadTimes, Turn, TurnPlan

FILE = __file__
# Options with which a profile takes little time.
QUICK = ("--max-duration", "0.5", "--no-cold-start", "--no-nodes", "--threads", "1")


class GivenTimes:
    """Takes turns of given milliseconds; waits for CPUs for a given share of the time."""

    def __init__(self, name, times, *, waiting=0.0, on_gpu=False, fails_in=None, stops_in=None):
        self.name, self.on_gpu = name, on_gpu
        self._times, self._waiting = itertools.cycle(times), waiting
        self._fails_in, self._stops_in = fails_in, stops_in
        self.turns, self.settled, self.ran = 0, 0, 0

    def turn(self, plan: TurnPlan) -> Turn:
        self.turns += 1
        if self.turns == self._fails_in:
            raise CandidateError(f"{self.name}: its process was killed by SIGKILL.")
        if self.turns == self._stops_in:
            raise KeyboardInterrupt
        ms = next(self._times)
        self.ran += round(ms * 1e6)
        sample = Sample(wall_ms=3.0 * ms, cpu_ms=ms, device_ms=2.0 * ms)
        return Turn(sample if plan.cold else None, (sample,))

    def pace(self, rate: float, seconds: float) -> list[tuple[float, float]]:
        if self._fails_in:
            raise CandidateError(f"{self.name}: ended")
        return [(1.0, 1.0)] * round(rate * seconds)

    def settle(self) -> None:
        self.settled += 1

    def thread_times(self) -> ThreadTimes:
        waited = self.ran * self._waiting / (1.0 - self._waiting)
        return {"1": (self.ran, round(waited))}


def make_counter(start=0):
    """A candidate that counts its calls."""
    return itertools.count(start).__next__


def make_choosing(numbers):
    """A candidate that counts within a list, which can be exchanged."""

    class Choosing:
        def __init__(self):
            self.described = {"precision": "exact"}

        def select(self, numbers):
            self._left = list(numbers)

        def __call__(self):
            self.last = self._left.pop(0)

        def labels(self, index):
            return [self.last, index]

    choosing = Choosing()
    choosing.select(numbers)
    return choosing


def make_killed(signal_number=int(signal.SIGKILL), at=3):
    """A candidate whose process is killed in one of its calls."""
    calls = itertools.count(1)

    def call():
        if next(calls) == at:
            os.kill(os.getpid(), signal_number)

    return call


def make_failing(message="no luck"):
    """A candidate that cannot be called a second time."""
    calls = itertools.count()

    def call():
        if next(calls):
            raise ValueError(message)

    return call


def make_ending():
    """A candidate whose process ends by itself."""
    raise SystemExit("out of ideas")
