"""What a frame costs in windows, in letterbox and stretched, beside what so many runs cost.

    python benchmarks/windows.py [--bundle demo] [--frame 1280x720] [--rounds 40] [--json FILE]

Goal: a frame takes at most 1.05 times as long as its windows one by one, each a stretched frame.
Engines of one bundle take turns on two threads; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.demo import demo_classes
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.worker import Stopwatch
from zsseg_rt.runtime.frames import Windows

ROOT = Path(__file__).resolve().parents[1]
GOAL = 1.05
THREADS = 2
WAYS: dict[str, dict[str, Any]] = {
    "stretch": {"resize": "stretch"},
    "letterbox": {"resize": "letterbox"},
    "windows": {"windows": "auto"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", help="a folder; default: the photo demo's")
    parser.add_argument("--frame", default="1280x720", help="WIDTHxHEIGHT")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    bundle = Bundle.demo() if args.bundle is None else Bundle.open(args.bundle)
    width, height = map(int, args.frame.split("x"))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    frame = np.asarray(cv2.GaussianBlur(noise, (0, 0), 6), np.uint8)
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(ROOT),
        "load": os.getloadavg(),
        "frame": args.frame,
        "ways": measure(bundle, frame, args.rounds),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["ways"]["windows"]["ratio"] <= GOAL else 1


def measure(
    bundle: Bundle, frame: npt.NDArray[np.uint8], rounds: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each way, and of its ratio to as many stretched frames."""
    engines, counts = {}, {}
    for name, settings in WAYS.items():
        config = EngineConfig(device="cpu", num_threads=THREADS, **settings)
        plan = Windows.of(bundle.preprocess, bundle.head, config)
        counts[name] = 1 if plan is None else len(plan.plan(frame.shape[:2]).places)
        engines[name] = Engine(bundle, config)
        engines[name].set_classes(demo_classes())
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine.segment(frame)  # what the one before left in the caches is not its fault
            watch = Stopwatch()
            engine.segment(frame)
            times[name].append(1000 * watch.seconds)
    for engine in engines.values():
        engine.close()
    return {
        name: {
            "windows": counts[name],
            "median_ms": round(statistics.median(taken), 2),
            "ratio": round(
                statistics.median(
                    own / (counts[name] * one)
                    for own, one in zip(taken, times["stretch"], strict=True)
                ),
                4,
            ),
        }
        for name, taken in times.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
