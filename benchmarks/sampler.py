"""Try the sampler on what is known: an engine against itself, and against itself made slower.

    python benchmarks/sampler.py [--comparisons 40] [--found 20] [--max-rounds 200] [--json FILE]
    python benchmarks/sampler.py --simulated      # no engine: times drawn from a busy machine's

Goals: of 40 self-comparisons at most 2 get a verdict, a candidate 10 % slower is found in 19 of 20,
within 200 rounds of a short frame or 30 of a long one, and measuring costs at most 1 %. Engines are
processes of their own. "Slower" is a fixed amount of work after each frame: 10 % of the CPU time
of its median frame.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.candidates import Candidate
from zsseg_rt.profiling.children import ChildCandidate
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.meter import Meter, Paced, Sample, ThreadTimes, Turn, TurnPlan
from zsseg_rt.profiling.turns import StopRule, take_turns, take_turns_locally

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"false verdicts of 40": 2, "found of 20": 19, "cost of measuring": 0.01}
THRESHOLD, SLOWER, SETTLED, CALIBRATED = 0.02, 0.10, 30, 200
LONG_FRAME_MS = 100.0


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, run all trials, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=demo_bundle())
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--found", type=int, default=20)
    parser.add_argument("--max-rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    report = {"threshold": THRESHOLD, "slower": SLOWER, "max_rounds": args.max_rounds}
    report |= simulated(args) if args.simulated else real(args)
    report |= {"machine": describe_machine(), "commit": describe_commit(ROOT), "goals": GOALS}
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def real(args: argparse.Namespace) -> dict[str, Any]:
    """Compare engines in processes of their own."""

    def opened(name: str, slower: float) -> ChildCandidate:
        arguments = {"bundle": str(args.bundle), "threads": args.threads, "slower": slower}
        spec = {"file": __file__, "function": "open_engine", "arguments": arguments}
        return ChildCandidate(name, spec)

    first, twin, slow = opened("first", 0.0), opened("twin", 0.0), opened("slow", SLOWER)
    try:
        fastest = min(child.warm_up() for child in (first, twin, slow))
        plan = TurnPlan(cold=fastest < LONG_FRAME_MS)
        same = [trial((first, twin), plan, args.max_rounds, n) for n in range(args.comparisons)]
        found = [trial((first, slow), plan, args.max_rounds, n) for n in range(args.found)]
    finally:
        for child in (first, twin, slow):
            child.close()
    figures = {"threads": args.threads, "fastest_frame_ms": fastest, "self": same, "slow": found}
    return figures | {"cost_of_measuring": cost_of_measuring(args)}


def trial(
    pair: tuple[Candidate, Candidate], plan: TurnPlan, rounds: int, seed: int
) -> dict[str, Any]:
    """Compare two candidates once, as the profiler does."""
    stop = StopRule(max_seconds=600.0, max_rounds=rounds, half_width=THRESHOLD / 2)
    taken = take_turns(pair, plan, stop, seed=seed)
    first, second = (candidate.name for candidate in pair)
    found = taken.difference(first, second, THRESHOLD)
    assert isinstance(found, Difference)
    return {
        **vars(found),
        "waiting": max(share or 0.0 for share in taken.waiting.values()),
        "wall_verdict_seconds": taken.seconds,
    }


def open_engine(bundle: str, threads: int, slower: float) -> Any:
    """In a candidate's process: label a frame, and then work for a share of the time it took."""
    from zsseg_rt import Engine, EngineConfig
    from zsseg_rt.photos import read_photo

    engine = Engine(bundle, EngineConfig(device="cpu", num_threads=threads))
    engine.set_classes(demo_classes())
    frame = read_photo(demo_photos()[0])
    meter, work = Meter(), np.ones(4096, np.float32)

    def labelled() -> Any:
        return engine.segment(frame)

    if not slower:
        return labelled

    def busy(steps: int) -> None:
        for _ in range(steps):
            np.multiply(work, 1.0, out=work)

    for _ in range(SETTLED):
        labelled()
    frames, steps = [], []
    for _ in range(5 * SETTLED):  # side by side: a busy machine slows both
        frames.append(meter.measure(labelled).cpu_ms)
        steps.append(meter.measure(lambda: busy(CALIBRATED)).cpu_ms)
    extra = round(slower * CALIBRATED * statistics.median(frames) / statistics.median(steps))

    def labelled_slowly() -> None:
        labelled()
        busy(extra)

    return labelled_slowly


def cost_of_measuring(args: argparse.Namespace) -> dict[str, Any]:
    """Eight frames in a loop, each measured against none measured."""
    call, meter = open_engine(str(args.bundle), args.threads, 0.0), Meter()

    def measured() -> None:
        for _ in range(8):
            meter.measure(call)

    def bare() -> None:
        for _ in range(8):
            call()

    plan = TurnPlan(cold=False, measuring_ms=0.0)
    taken = take_turns_locally({"bare": bare, "measured": measured}, rounds=100, plan=plan)
    found = taken.difference("bare", "measured", GOALS["cost of measuring"])
    assert isinstance(found, Difference)
    return dict(vars(found))


class BusyMachine:
    """Draws times as a busy machine gives them: slow drifts, and waits of whole time slices."""

    def __init__(self, seed: int) -> None:
        self._random, self._load = np.random.default_rng(seed), 1.0

    def sample(self, frame_ms: float) -> Sample:
        """One frame."""
        random = self._random
        self._load = float(np.clip(self._load * np.exp(random.normal(0.0, 0.05)), 0.8, 1.4))
        cpu = frame_ms * self._load * float(np.exp(random.normal(0.0, 0.03)))
        wait = 3.0 * float(random.poisson(1.5))
        return Sample(wall_ms=cpu + wait, cpu_ms=cpu, wait_ms=wait)


class SimulatedCandidate:
    """Takes turns on a simulated machine."""

    on_gpu = False

    def __init__(self, name: str, machine: BusyMachine, frame_ms: float) -> None:
        self.name, self._machine, self._frame_ms = name, machine, frame_ms
        self._ran = self._waited = 0.0

    def turn(self, plan: TurnPlan) -> Turn:
        """Draw up to as many frames as fit."""
        count = min(plan.most_calls, max(1, round(plan.measuring_ms / self._frame_ms)))
        warm = tuple(self._machine.sample(self._frame_ms) for _ in range(count))
        self._ran += sum(sample.cpu_ms for sample in warm)
        self._waited += sum(sample.wait_ms or 0.0 for sample in warm)
        return Turn(self._machine.sample(self._frame_ms) if plan.cold else None, warm)

    def pace(self, rate: float, seconds: float) -> list[Paced]:
        """No frames: nothing here has a clock."""
        return []

    def settle(self) -> None:
        """Nothing spins."""

    def thread_times(self) -> ThreadTimes:
        """As drawn."""
        return ThreadTimes({"1": int(self._ran * 1e6)}, {"1": int(self._waited * 1e6)})

    def close(self) -> None:
        """Nothing to free."""


def simulated(args: argparse.Namespace) -> dict[str, Any]:
    """Compare simulated candidates, a machine of its own for each comparison."""

    def run(seed: int, frame_ms: float) -> dict[str, Any]:
        machine = BusyMachine(seed)
        pair = (
            SimulatedCandidate("first", machine, 2.0),
            SimulatedCandidate("second", machine, frame_ms),
        )
        return trial(pair, TurnPlan(), args.max_rounds, seed)

    return {
        "self": [run(seed, 2.0) for seed in range(args.comparisons)],
        "slow": [run(1000 + seed, 2.0 * (1.0 + SLOWER)) for seed in range(args.found)],
    }


def print_report(report: dict[str, Any]) -> None:
    same, slow = report["self"], report["slow"]
    wrong = sum(one["verdict"] in ("slower", "faster") for one in same)
    found = sum(one["verdict"] == "slower" for one in slow)
    print(f"{report['machine']['cpu']}, commit {report['commit']}")
    print(f"against itself: {wrong} of {len(same)} got a verdict;  {summary(same)}")
    print(f"against itself {SLOWER:.0%} slower: found in {found} of {len(slow)};  {summary(slow)}")
    if "cost_of_measuring" in report:
        cost = report["cost_of_measuring"]
        print(f"measuring costs {cost['change']:.2%} [{cost['low']:.2%}, {cost['high']:.2%}]")


def summary(trials: list[dict[str, Any]]) -> str:
    """Rounds, bases and waiting in a few words."""
    if not trials:
        return "none tried"
    bases = sorted({one["basis"] for one in trials})
    changes = sorted(one["change"] for one in trials)
    waiting = sorted(one["waiting"] for one in trials)
    rounds = sorted(one["rounds"] for one in trials)
    return (
        f"by {' and '.join(bases)} time, changes {changes[0]:+.1%} to {changes[-1]:+.1%}, "
        f"rounds {rounds[0]} to {rounds[-1]}, waiting {waiting[0]:.0%} to {waiting[-1]:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
