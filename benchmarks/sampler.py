"""Try the sampler on what is known: an engine against itself, and against itself made slower.

    python benchmarks/sampler.py [--bundle NAME.zsseg] [--threads 1] [--busy 6] [--json FILE]

Of 40 comparisons of an engine with itself at most 2 may get a verdict, and of 20 with itself made
10 % slower 19 must find that, within 200 rounds. Engines are processes of their own. "Slower" is a
fixed amount of work after each frame, on as many threads: 10 % of the CPU time of its median frame.
The three take turns in the same rounds, beside as many busy processes as ``--busy`` says. With the
drawn demo's frames of 2 ms it takes 5 to 15 minutes; with ``--bundle`` a network of 200 ms, give
``--threads 2 --comparisons 20 --max-rounds 30`` and 10 to 40. The JSON file is written after every
comparison. ``test_profiling.py`` does the same with simulated times.
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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.turns import ChildCandidate, StopRule, take_turns
from zsseg_rt.profiling.worker import LocalCandidate, Stopwatch, TurnPlan

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD, SLOWER = 0.02, 0.10
LONG_FRAME_MS = 100.0
BUSY_FLAG = "--busy-process"


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, run all trials, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=demo_bundle("scenes"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--comparisons", type=int, default=40, help="with itself; half with slower")
    parser.add_argument("--max-rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    watch = Stopwatch()
    report: dict[str, Any] = {"machine": describe_machine(), "commit": describe_commit(ROOT)}
    report |= {"self": [], "slow": [], "threads": args.threads, "busy": args.busy}
    with busy_processes(args.busy):
        for other, figures in compare(args):
            report[other].append(figures)
            report["seconds"] = watch.seconds
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    for other, verdicts, goal in (
        ("self", ("slower", "faster"), "at most 2 of 40"),
        ("slow", ("slower",), "at least 19 of 20"),
    ):
        tried = report[other]
        count = sum(one["verdict"] in verdicts for one in tried)
        print(f"{other}: {count} of {len(tried)} got a verdict (goal: {goal});  {summary(tried)}")
    return 0


def compare(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """All comparisons; half as many with the slower one, in the same rounds."""

    def opened(name: str, slower: float) -> ChildCandidate:
        arguments = {"bundle": str(args.bundle), "threads": args.threads, "slower": slower}
        spec = {"file": __file__, "function": "open_engine", "arguments": arguments}
        return ChildCandidate(name, spec)

    first, twin, slow = opened("first", 0.0), opened("self", 0.0), opened("slow", SLOWER)
    try:
        fastest = min(child.warm_up() for child in (first, twin, slow))
        plan = TurnPlan(cold=fastest < LONG_FRAME_MS)
        stop = StopRule(max_seconds=1200.0, max_rounds=args.max_rounds, half_width=THRESHOLD / 2)
        for number in range(args.comparisons):
            others = [twin, slow] if number % 2 == 0 else [twin]
            taken = take_turns((first, *others), plan, stop, seed=number)
            for other in others:
                difference = taken.difference("first", other.name, THRESHOLD)
                assert isinstance(difference, Difference)
                waiting = max(taken.waiting[name] or 0.0 for name in ("first", other.name))
                yield other.name, {**vars(difference), "waiting": waiting, "seconds": taken.seconds}
            print(f"{number + 1} of {args.comparisons}", file=sys.stderr)
    finally:
        for child in (first, twin, slow):
            child.close()


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
