"""Try the sampler on what is known: an engine against itself, and against itself made slower.

    python benchmarks/sampler.py FORM [--json FILE]

| form | what | minutes, about |
|---|---|---|
| quiet-2ms | the demo, one thread, nothing else running: 40 self-comparisons, 20 of 10 % | 5 to 8 |
| busy-2ms | the same beside 6 busy processes, which it starts | 8 to 15 |
| quiet-230ms | ViT-B/16 with random weights, two threads: 20 comparisons of each kind | 10 |
| busy-230ms | the same beside 6 busy processes | 40 |
| cost | what measuring a frame of the demo costs | 1 |
| simulated | no engine: times drawn from a busy machine's | below 1 |

Goals: of 40 self-comparisons at most 2 get a verdict, a candidate 10 % slower is found in 19 of 20,
within 200 rounds of a short frame or 30 of a long one, and measuring costs at most 1 %. Engines are
processes of their own. "Slower" is a fixed amount of work after each frame, on as many threads:
10 % of the CPU time of its median frame. The three take turns in the same rounds. The 230 ms forms
need torch and onnx, to export their bundle; --bundle keeps it, or takes one that is there. The JSON
file is written after every comparison, so a form that is ended early keeps what it found.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.turns import ChildCandidate, StopRule, take_turns
from zsseg_rt.profiling.worker import (
    LocalCandidate,
    Paced,
    Sample,
    Stopwatch,
    ThreadTimes,
    Turn,
    TurnPlan,
)

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"false verdicts of 40": 2, "found of 20": 19, "cost of measuring": 0.01}
THRESHOLD, SLOWER = 0.02, 0.10
LONG_FRAME_MS = 100.0
BUSY_FLAG = "--busy-process"
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What to try.

    Attributes:
        comparisons: Of the engine with itself.
        found: Of the engine with itself made slower, in the rounds of the first of those.
        max_rounds: Rounds at most.
        real_size: Whether the bundle is ViT-B/16 and not the demo.
        busy: Processes that compute meanwhile.
        threads: CPU threads of an engine.
    """

    comparisons: int = 40
    found: int = 20
    max_rounds: int = 200
    real_size: bool = False
    busy: int = 0
    threads: int = 1


FORMS = {
    "quiet-2ms": Form(),
    "busy-2ms": Form(busy=6),
    "quiet-230ms": Form(real_size=True, threads=2, max_rounds=30, comparisons=20),
    "busy-230ms": Form(real_size=True, threads=2, max_rounds=30, comparisons=20, busy=6),
    "cost": Form(comparisons=0, found=0),
    "simulated": Form(),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, run all trials, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("--bundle", type=Path, help="where the exported bundle is, or will be")
    parser.add_argument("--comparisons", type=int, help="fewer or more than the form's")
    parser.add_argument("--found", type=int, help="fewer or more than the form's")
    parser.add_argument("--max-rounds", type=int, help="fewer or more than the form's")
    parser.add_argument("--busy", type=int, help="busy processes, where others are there already")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    given = {key: getattr(args, key) for key in ("comparisons", "found", "max_rounds", "busy")}
    settings = vars(FORMS[args.form]) | {k: v for k, v in given.items() if v is not None}
    form, watch = Form(**settings), Stopwatch()
    report = {"form": args.form, "threshold": THRESHOLD, "slower": SLOWER} | vars(form)
    report |= {"machine": describe_machine(), "commit": describe_commit(ROOT), "goals": GOALS}

    def keep(figures: dict[str, Any]) -> None:
        report.update(figures, seconds=watch.seconds)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")

    if args.form == "simulated":
        keep(simulated(form))
    else:
        real(form, args, keep)
    print_report(report)
    return 0


def real(form: Form, args: argparse.Namespace, keep: Keep) -> None:
    """Compare engines in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or demo_bundle("scenes")
        if form.real_size:
            bundle = args.bundle or Path(folder) / "real.zsseg"
            if not bundle.exists():
                export_real_size(bundle)
        with busy_processes(form.busy):
            if args.form == "cost":
                keep({"cost_of_measuring": cost_of_measuring(bundle, form.threads)})
            else:
                compare(form, bundle, keep)


def compare(form: Form, bundle: Path, keep: Keep) -> None:
    """All comparisons of a form, kept after each."""

    def opened(name: str, slower: float) -> ChildCandidate:
        arguments = {"bundle": str(bundle), "threads": form.threads, "slower": slower}
        spec = {"file": __file__, "function": "open_engine", "arguments": arguments}
        return ChildCandidate(name, spec)

    same, found = [], []
    first, twin, slow = opened("first", 0.0), opened("twin", 0.0), opened("slow", SLOWER)
    try:
        fastest = min(child.warm_up() for child in (first, twin, slow))
        plan = TurnPlan(cold=fastest < LONG_FRAME_MS)
        for number in range(max(form.comparisons, form.found)):
            others = [twin] if number < form.comparisons else []
            others += [slow] if number < form.found else []
            figures = trials((first, *others), plan, form.max_rounds, number)
            same += [figures["twin"]] if "twin" in figures else []
            found += [figures["slow"]] if "slow" in figures else []
            keep({"fastest_frame_ms": fastest, "self": same, "slow": found})
            print(f"{number + 1} of {max(form.comparisons, form.found)}", file=sys.stderr)
    finally:
        for child in (first, twin, slow):
            child.close()


def export_real_size(bundle: Path) -> None:
    """Write ViT-B/16 with random weights, as benchmarks/engine.py makes it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import engine

    print("exporting the bundle", file=sys.stderr)
    engine.export(engine.build_model("real"), bundle)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let so many processes compute in bursts, as builds and tests do; they end with this one."""
    children = [
        subprocess.Popen([sys.executable, __file__, BUSY_FLAG, str(seed)]) for seed in range(count)
    ]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def be_busy(seed: int) -> None:
    """Compute for some 5 to 250 ms, sleep for up to 20 ms, and so on, until the parent ends."""
    parent, order, work = os.getppid(), random.Random(seed), np.ones(1 << 16, np.float32)
    while os.getppid() == parent:
        for _ in range(order.randrange(200, 10_000)):
            np.multiply(work, 1.0, out=work)
        time.sleep(order.uniform(0.0, 0.02))


def trials(
    candidates: tuple[LocalCandidate, ...], plan: TurnPlan, rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Compare candidates with the first one, once, as the profiler does."""
    stop = StopRule(max_seconds=1200.0, max_rounds=rounds, half_width=THRESHOLD / 2)
    taken = take_turns(candidates, plan, stop, seed=seed)
    first, *others = (candidate.name for candidate in candidates)
    figures = {}
    for other in others:
        found = taken.difference(first, other, THRESHOLD)
        assert isinstance(found, Difference)
        shares = [taken.waiting[name] or 0.0 for name in (first, other)]
        figures[other] = {**vars(found), "waiting": max(shares), "seconds": taken.seconds}
    return figures


def trial(
    pair: tuple[LocalCandidate, LocalCandidate], plan: TurnPlan, rounds: int, seed: int
) -> dict[str, Any]:
    """Compare two candidates once."""
    return trials(pair, plan, rounds, seed)[pair[1].name]


def open_engine(bundle: str, threads: int, slower: float) -> Any:
    """In a candidate's process: label a frame, and then work for a share of the time it took."""
    from zsseg_rt import Engine, EngineConfig
    from zsseg_rt.photos import read_photo

    engine = Engine(bundle, EngineConfig(device="cpu", num_threads=threads))
    if Path(bundle) == demo_bundle("scenes"):
        engine.set_classes(demo_classes("scenes"))
    else:
        rows = np.random.default_rng(0).standard_normal((20, Bundle.load(bundle).text.embed_dim))
        unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        engine.set_classes([f"class {index}" for index in range(20)], embeddings=unit)
    labelled = functools.partial(engine.segment, read_photo(demo_photos("scenes")[0]))
    if not slower:
        return labelled
    work = SharedWork(threads)
    work.calibrate(labelled, slower)

    def labelled_slowly() -> None:
        labelled()
        work.do()

    return labelled_slowly


class SharedWork:
    """A fixed amount of work, spread over threads as a frame is."""

    def __init__(self, threads: int) -> None:
        self._arrays = [np.ones(1 << 12, np.float32) for _ in range(threads)]
        if threads > 1:  # long calls: they give way to each other in between
            self._arrays = [np.ones(1 << 17, np.float32) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(max(1, threads - 1))
        self.steps = 200

    def do(self) -> None:
        """Do it, and wait for all threads."""
        others = [self._pool.submit(self._work, array) for array in self._arrays[1:]]
        self._work(self._arrays[0])
        for other in others:
            other.result()

    def calibrate(self, call: Any, share: float) -> None:
        """Make it take a share of the CPU time of a call."""
        theirs, ours = LocalCandidate("theirs", call), LocalCandidate("ours", self.do)
        long = min(theirs.measure().wall_ms for _ in range(3)) > LONG_FRAME_MS
        calls, own = [], []
        for _ in range(0 if long else 30):
            call()
        for _ in range(12 if long else 150):  # side by side: a busy machine slows both
            calls.append(theirs.measure().cpu_ms)
            own.append(ours.measure().cpu_ms)
        ratio = statistics.median(calls) / statistics.median(own)
        self.steps = max(1, round(share * self.steps * ratio))

    def _work(self, array: Any) -> None:
        for _ in range(self.steps):
            np.multiply(array, 1.0, out=array)


def cost_of_measuring(bundle: Path, threads: int) -> dict[str, Any]:
    """Eight frames in a loop, each measured against none measured."""
    call = open_engine(str(bundle), threads, 0.0)
    frame = LocalCandidate("frame", call)

    def measured() -> None:
        for _ in range(8):
            frame.measure()

    def bare() -> None:
        for _ in range(8):
            call()

    for _ in range(10):
        bare()
    candidates = [LocalCandidate("bare", bare), LocalCandidate("measured", measured)]
    plan = TurnPlan(cold=False, measuring_ms=0.0)
    stop = StopRule(max_seconds=60.0, min_rounds=100, half_width=0.002)
    taken = take_turns(candidates, plan, stop)
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
        return Sample(wall_ms=cpu + wait, cpu_ms=cpu)


class SimulatedCandidate(LocalCandidate):
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
        self._waited += sum(sample.wall_ms - sample.cpu_ms for sample in warm)
        return Turn(self._machine.sample(self._frame_ms) if plan.cold else None, warm)

    def pace(self, rate: float, seconds: float) -> list[Paced]:
        """No frames: nothing here has a clock."""
        return []

    def settle(self) -> None:
        """Nothing spins."""

    def thread_times(self) -> ThreadTimes:
        """As drawn."""
        return {"1": (int(self._ran * 1e6), int(self._waited * 1e6))}


def simulated(form: Form) -> dict[str, Any]:
    """Compare simulated candidates, a machine of its own for each comparison."""

    def run(seed: int, frame_ms: float) -> dict[str, Any]:
        machine = BusyMachine(seed)
        pair = (
            SimulatedCandidate("first", machine, 2.0),
            SimulatedCandidate("second", machine, frame_ms),
        )
        return trial(pair, TurnPlan(), form.max_rounds, seed)

    return {
        "self": [run(seed, 2.0) for seed in range(form.comparisons)],
        "slow": [run(1000 + seed, 2.0 * (1.0 + SLOWER)) for seed in range(form.found)],
    }


def print_report(report: dict[str, Any]) -> None:
    """Print what was found, beside the goals."""
    same, slow = report.get("self", ()), report.get("slow", ())
    print(f"{report['form']}: {report['machine']['cpu']}, commit {report['commit']}, "
          f"{report['seconds'] / 60:.1f} minutes")  # fmt: skip
    if same:
        wrong = sum(one["verdict"] in ("slower", "faster") for one in same)
        print(f"against itself: {wrong} of {len(same)} got a verdict (goal: at most "
              f"{GOALS['false verdicts of 40']} of 40);  {summary(same)}")  # fmt: skip
    if slow:
        found = sum(one["verdict"] == "slower" for one in slow)
        print(f"against itself {SLOWER:.0%} slower: found in {found} of {len(slow)} (goal: at "
              f"least {GOALS['found of 20']} of 20);  {summary(slow)}")  # fmt: skip
    if "cost_of_measuring" in report:
        cost = report["cost_of_measuring"]
        print(f"measuring costs {cost['change']:.2%} [{cost['low']:.2%}, {cost['high']:.2%}] of a "
              f"frame (goal: at most {GOALS['cost of measuring']:.0%}), "
              f"{cost['rounds']} rounds")  # fmt: skip


def summary(tried: list[dict[str, Any]]) -> str:
    """Rounds, bases and waiting in a few words."""
    bases = sorted({one["basis"] for one in tried})
    changes = sorted(one["change"] for one in tried)
    waiting = sorted(one["waiting"] for one in tried)
    rounds = sorted(one["rounds"] for one in tried)
    return (
        f"by {' and '.join(bases)} time, changes {changes[0]:+.1%} to {changes[-1]:+.1%}, "
        f"rounds {rounds[0]} to {rounds[-1]}, waiting {waiting[0]:.0%} to {waiting[-1]:.0%}"
    )


if __name__ == "__main__":
    if BUSY_FLAG in sys.argv:
        be_busy(int(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
