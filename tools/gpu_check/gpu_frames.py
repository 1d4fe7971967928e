"""Label frames of every family on a GPU with one backend, and compare with what they must be.

Stored bundles are compared with their stored labels, all bundles with their golden samples, frames
that were recorded with those that were not, host with device, and two lanes in two threads with
one. Needs NumPy and the backend, no test package. What was found is kept after every bundle.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt import Bundle, Engine, EngineConfig, ops
from zsseg_rt.common.files import write_whole

STORED = Path(__file__).resolve().parents[2] / "python_tests" / "bundles" / "v1"
# Shares of pixels that must have the stored labels: weights are random, many pixels near ties.
AGREEMENT = {"float32": 0.999, "float16": 0.9}
# Shares that may change from frame to frame: libraries may add in another order beside others.
UNEQUAL = {"float32": 1e-3, "float16": 1e-2}
TURNS = 5  # the first is plain, the second is recorded, later ones are replayed
LANE_TURNS = 20


class WrongError(Exception):
    """A frame or a plan is not what it must be."""


def main(arguments: list[str] | None = None) -> int:
    """Check every bundle that time is left for; 0 if all are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="also this one")
    parser.add_argument("--quick", action="store_true", help="one stored bundle")
    parser.add_argument("--plans", metavar="PRECISION", help="only build this precision's plans")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no bundle later")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    began, rows = time.monotonic(), []
    for bundle, precision in planned(args):
        row: dict[str, Any] = {"bundle": bundle.stem, "precision": precision}
        start = time.monotonic()
        if start - began > args.seconds:
            row |= {"state": "missing", "reason": "no time was left"}
        else:
            check = build_plans if args.plans else check_bundle
            row |= judge(lambda b=bundle, p=precision, c=check: c(args, b, p))
            row["seconds"] = round(time.monotonic() - start, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            write_whole(args.json, (json.dumps({"rows": rows}, indent=2) + "\n").encode())
    states = {row["state"] for row in rows}
    return 1 if "failed" in states else 3 if "missing" in states else 0


def planned(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """Bundles and the precisions they hold: those first whose plans take seconds."""
    stored = sorted(STORED.glob("*.zsseg"))
    bundles = [STORED / "descriptor.zsseg"] if args.quick else stored
    for bundle in [*bundles, *args.bundle]:
        for precision in [args.plans] if args.plans else ("float16", "float32"):
            if all(precision in kinds for kinds in Bundle.load(bundle).graphs.values()):
                yield bundle, precision


def judge(check: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A check's outcome, and the warnings that were logged meanwhile."""
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zsseg_rt").addHandler(listener)
    try:
        outcome: dict[str, Any] = {"state": "passed", **check()}
    except Exception as exc:  # noqa: BLE001 - the other bundles are still of use
        outcome = {"state": "failed", "reason": f"{type(exc).__name__}: {exc}"}
    finally:
        logging.getLogger("zsseg_rt").removeHandler(listener)
    return outcome | ({"warnings": heard} if heard else {})


def build_plans(args: argparse.Namespace, path: Path, precision: str) -> dict[str, Any]:
    """Open a bundle once: its plans are built, proved and kept."""
    config = EngineConfig(
        device=args.device, backend=args.backend, precision=precision, num_lanes=2
    )
    start = time.monotonic()
    with Engine(path, config) as engine:
        return {"open_seconds": round(time.monotonic() - start, 2), **describe_plans(engine)}


def check_bundle(args: argparse.Namespace, path: Path, precision: str) -> dict[str, Any]:
    """Check one bundle at one precision; returns what is worth knowing."""
    config = EngineConfig(
        device=args.device, backend=args.backend, precision=precision, num_lanes=2
    )
    most, turns, lane_turns = UNEQUAL[precision], TURNS, LANE_TURNS
    if args.quick:
        turns = lane_turns = 2
    start = time.monotonic()
    with Engine(path, config) as engine:
        outcome: dict[str, Any] = {"open_seconds": round(time.monotonic() - start, 2)}
        report = engine.self_check()
        if not report.passed:
            raise WrongError(f"self-check: {report.first_failure}")
        outcome["errors"] = {stage.stage: stage.error for stage in report.stages}
        names, embeddings, frames = inputs_of(path)
        engine.set_classes(names, embeddings=embeddings)
        labels = [engine.segment(frame, unknown_below=0.0).labels for frame in frames]
        if path.parent == STORED:
            outcome["agreement"] = compare_stored(path.stem, labels, AGREEMENT[precision])
        outcome["unequal"] = {
            "replayed": check_again(engine.segment, frames, labels, most, turns),
            "two lanes": check_lanes(engine, frames, labels, most, lane_turns),
        }
        if engine.device != "cpu":
            placed = [ops.DeviceArray.from_numpy(frame) for frame in frames]
            shares = check_again(engine.segment_device, placed, labels, most, turns)
            outcome["unequal"]["from the device"] = shares
        outcome |= describe_plans(engine)
    return outcome


def inputs_of(path: Path) -> tuple[list[str], np.ndarray | None, list[np.ndarray]]:
    """Names, embeddings where no text bank holds them, and two frames of different sizes."""
    blocks = np.random.RandomState(0).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    blocks = np.ascontiguousarray(blocks.repeat(24, 0).repeat(30, 1))
    with np.load(path / "golden.npz") as golden:
        frames = [golden["frame"], blocks]
        bank = Bundle.load(path).text_bank
        if bank is not None:
            return list(bank.names), None, frames
        return [str(name) for name in golden["class_names"]], golden["text_embeds"], frames


def compare_stored(name: str, labels: Sequence[np.ndarray], least: float) -> list[float]:
    """Shares of pixels that have the labels in the stored file."""
    with np.load(STORED / "labels.npz") as stored:
        shares = [float((each == stored[f"{name}.{index}.0.0"]).mean())
                  for index, each in enumerate(labels)]  # fmt: skip
    if min(shares) < least:
        raise WrongError(f"expected {least:.1%} of the stored labels, got {min(shares):.3%}")
    return shares


def check_again(
    segment: Callable[..., Any],
    frames: Sequence[Any],
    labels: Sequence[np.ndarray],
    most: float,
    turns: int,
) -> float:
    """Label frames in turns; returns the largest share of labels that differ from the first."""
    worst = 0.0
    for turn in range(turns):
        for frame, expected in zip(frames, labels, strict=True):
            got = segment(frame, unknown_below=0.0).labels
            got = got if isinstance(got, np.ndarray) else got.numpy()
            worst = max(worst, float((got != expected).mean()))
            if worst > most:
                raise WrongError(f"turn {turn} of {frame.shape}: {worst:.3%} of the labels differ")
    return worst


def check_lanes(
    engine: Engine,
    frames: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    most: float,
    turns: int,
) -> float:
    """The same in two lanes and two threads at once."""
    with engine.lane() as second, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(check_again, lane.segment, frames, labels, most, turns)
                for lane in (engine, second)]  # fmt: skip
        return max(job.result() for job in jobs)


def describe_plans(engine: Engine) -> dict[str, Any]:
    """Fused attention by graph; for plans, that the golden sample's verdict lies beside each."""
    reports = {name: getattr(graph, "report", {}) for name, graph in engine._graphs.items()}
    fused = {name: report.get("fused_layers", report.get("fused_attention"))
             for name, report in reports.items()}  # fmt: skip
    plans = [graph.plan_name for graph in engine._graphs.values() if graph.plan_name]
    for plan in plans:
        head, _, _ = Path(plan).with_suffix(".golden").read_bytes().partition(b"\n")
        if json.loads(head)["about"]["problem"]:
            raise WrongError(f"{plan}: expected the golden sample's verdict beside it, got none")
    return {"fused_attention": fused, "proved_plans": len(plans)}


if __name__ == "__main__":
    sys.exit(main())
