"""Measure the engine on a GPU beside torch with the same weights, side by side in one run.

    python benchmarks/engine.py [--size real|tiny] [--backend torch|tensorrt] [--bundle DIR]
        [--against eager|compiled|none] [--seconds T] [--json FILE]

A frame goes in, labels of its size come out: from host to host, as a camera program has them, and
from device to device. torch does the same work (resize, normalise, model, upsample, sigmoid,
argmax) at float16 and float32. Weights are random: speed and agreement are measured, not accuracy;
of the large model's, only signs are, so that its bundle packs into 26 MB. All candidates of a case
take turns, and the report is kept after every case. What a machine cannot tell or do (launches
without CUPTI, a precision that a backend does not have, a rival that runs out of memory) is said,
not zero. torch need not be installed. On a CPU, ``run.py`` compares the engine with its rivals.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from engine_model import build_model, class_names, export
from engine_rivals import TorchRival, count_launches, free_bytes

from zsseg_rt import Bundle, Engine, EngineConfig, ops
from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import PrecisionNotApplied
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.ops import reference
from zsseg_rt.profiling.turns import take_turns_locally
from zsseg_rt.profiling.worker import Sample, Stopwatch, TurnPlan

ROOT = Path(__file__).resolve().parents[1]
FRAME_HW = (480, 640)
# The first of each matter most: with little time, they alone are measured.
SIZES_HW = ((512, 512), (1080, 1920), (480, 640))
CLASS_COUNTS = (20, 171, 1000)
PRECISIONS = ("float16", "float32", "bfloat16", "int8", "fp8")
RIVAL_PRECISIONS = ("float16", "float32")
CASE_SECONDS = 5.0
SWAPS = 20
PLAN = TurnPlan(pause_ms=0.0, cold=False, warming_ms=5.0, measuring_ms=40.0, most_calls=16)


def main() -> int:
    """Parse arguments, run everything, print a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bundle", type=Path, help="reuse or keep the exported bundle here")
    parser.add_argument("--backend", default="auto", help="torch or tensorrt")
    parser.add_argument("--against", choices=("eager", "compiled", "none"), default="eager")
    parser.add_argument("--seconds", type=float, default=math.inf, help="in all, about")
    args = parser.parse_args()
    if ops.cuda_device_count() == 0:
        print("engine.py: expected a CUDA device, got none. Use run.py on a CPU.", file=sys.stderr)
        return 4

    def keep(report: dict[str, Any]) -> None:
        if args.json:
            write_whole(args.json, (json.dumps(report, indent=2) + "\n").encode())

    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("ZSSEG_HOME", str(Path(folder) / "cache"))
        bundle = args.bundle or Path(folder) / "benchmark.zsseg"
        make_model = functools.cache(functools.partial(build_model, args.size))
        if not bundle.exists():
            export(make_model(), bundle, ("float32", "float16"))
        few: dict[str, Any] = {}
        if args.against == "compiled":  # which takes a minute for every size
            few = {"sizes_hw": ((512, 512),), "class_counts": (20,)}
        if args.size == "tiny":
            few = {"sizes_hw": ((30, 40),), "class_counts": (5,)}
        setting = Setting(
            torch_device=torch_on_gpu(),
            engine={"device": "cuda:0", "backend": args.backend},
            rivals=args.against,
            seconds=args.seconds,
            rounds=args.rounds,
            **few,
        )
        report = run(bundle, setting, make_model, keep)
    print_report(report)
    return 1 if report["failed"] else 0


@dataclass(kw_only=True)
class Setting:
    """Where and what is measured.

    Attributes:
        torch_device: Where torch computes; None where it cannot.
        engine: Settings of every engine.
        precisions: Of the engines; what the bundle or the backend lacks is said.
        rivals: ``"eager"`` or ``"compiled"`` torch, or ``"none"``.
        sizes_hw: Frames.
        class_counts: Numbers of classes.
        rounds: Turns a candidate takes in a case at most.
        seconds: No case begins later.
    """

    torch_device: str | None = "cuda:0"
    engine: Mapping[str, Any] = field(default_factory=lambda: {"device": "cuda:0"})
    precisions: tuple[str, ...] = PRECISIONS
    rivals: str = "eager"
    sizes_hw: tuple[tuple[int, int], ...] = SIZES_HW
    class_counts: tuple[int, ...] = CLASS_COUNTS
    rounds: int = 40
    seconds: float = math.inf


def run(
    bundle: Path,
    setting: Setting,
    make_model: Callable[[], Any],
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure every case; returns the report.

    Args:
        bundle: Holds the model's graphs.
        setting: Where and what.
        make_model: Makes the ZegCLIP model that the bundle was exported from, for rivals.
        keep: Called with the report after every case.
    """
    watch = Stopwatch()
    text = random_text(Bundle.load(bundle).text.embed_dim, max(setting.class_counts))
    report: dict[str, Any] = {
        "device": "cuda",
        "machine": describe_machine(*loaded("torch")) | {"gpu": str(ops.cuda_device_properties(0))},
        "gpu_before": read_gpu(),
        "commit": describe_commit(ROOT),
        "failed": {},
    }
    engines: dict[str, Engine] = {}
    try:
        open_engines(bundle, text, setting, engines, report)
        keep(report)
        rivals = make_rivals(make_model, setting) if engines else {}
        for case in itertools.product(setting.class_counts, setting.sizes_hw):
            if watch.seconds > setting.seconds:
                report.setdefault("not_measured", []).append(case)
                continue
            report.setdefault("cases", []).append(
                measure_case(engines, rivals, text, case, setting)
            )
            keep(report)
        if engines and watch.seconds < setting.seconds:
            first = next(iter(engines.values()))
            report["set_classes_ms"] = measure_swaps(first, text, setting)
    finally:
        for engine in engines.values():
            engine.close()
    report["gpu_after"] = read_gpu()
    keep(report)
    return report


def open_engines(
    bundle: Path,
    text: np.ndarray,
    setting: Setting,
    engines: dict[str, Engine],
    report: dict[str, Any],
) -> None:
    """Open an engine of every precision; the report says what it took, or why there is none."""
    report["opened"], report["missing"] = {}, {}
    for precision in setting.precisions:
        watch, before = Stopwatch(), free_bytes(setting.torch_device)
        try:
            engine = Engine(bundle, EngineConfig(precision=precision, **setting.engine))
        except PrecisionNotApplied as exc:
            report["missing"][precision] = first_line(exc)
            continue
        except Exception as exc:  # noqa: BLE001 - a fault of one precision hides no other
            report["failed"][precision] = f"{type(exc).__name__}: {first_line(exc)}"
            continue
        engines[precision] = engine
        set_classes(engine, text, setting.class_counts[0])
        engine.segment(random_frame(setting.sizes_hw[0]))
        after = free_bytes(setting.torch_device)
        is_measured = before is not None and after is not None
        report["opened"][precision] = {
            "backend": engine.backend,
            "seconds_to_first_frame": watch.seconds,
            "memory_mb": (before - after) / 1e6 if is_measured else "missing: torch does not tell",
        }


def make_rivals(make_model: Callable[[], Any], setting: Setting) -> dict[str, TorchRival]:
    """The rivals by name; none where torch computes nothing."""
    if setting.rivals == "none" or setting.torch_device is None:
        return {}
    model, device = make_model(), setting.torch_device
    if setting.rivals == "compiled":
        return {"torch.compile float16": TorchRival(model, "float16", device, compiled=True)}
    return {f"torch {name}": TorchRival(model, name, device) for name in RIVAL_PRECISIONS}


def measure_case(
    engines: Mapping[str, Engine],
    rivals: Mapping[str, TorchRival],
    text: np.ndarray,
    case: tuple[int, tuple[int, int]],
    setting: Setting,
) -> dict[str, Any]:
    """One number of classes with one frame size."""
    count, size_hw = case
    frame = random_frame(size_hw)
    for engine in engines.values():
        set_classes(engine, text, count)
    for rival in rivals.values():
        rival.set_classes(text[:count])
    calls, missing = candidates(engines, rivals, frame)
    return {
        "frame_hw": size_hw,
        "classes": count,
        "candidates": measure(calls, setting),
        "missing": missing,
        "agreement": agreement(engines, rivals, frame, missing),
    }


def candidates(
    engines: Mapping[str, Engine], rivals: Mapping[str, TorchRival], frame: np.ndarray
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The candidates that can be timed, and why others cannot."""
    calls: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    placed = ops.DeviceArray.from_numpy(frame)
    for precision, engine in engines.items():
        calls[f"engine {precision}, host to host"] = lambda engine=engine: engine.segment(frame)
        calls[f"engine {precision}, device to device"] = lambda engine=engine: (
            engine.segment_device(placed)
        )
    for name, rival in rivals.items():
        tensor = rival.place(frame)
        ways = {
            "host to host": lambda rival=rival: rival.from_host(frame),
            "device to device": lambda rival=rival, tensor=tensor: rival.from_device(tensor),
        }
        for way, call in ways.items():
            failure = rival.try_out(call)
            if failure:
                missing[f"{name}, {way}"] = failure
            else:
                calls[f"{name}, {way}"] = call
    return calls, missing


def measure(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, dict[str, Any]]:
    """Times, CPU time and launches of every candidate."""
    taken = take_turns_locally(calls, rounds=setting.rounds, plan=PLAN, max_seconds=CASE_SECONDS)
    return {
        name: summarise(taken.warm(name)) | {"launches": count_launches(call, setting.torch_device)}
        for name, call in calls.items()
    }


def summarise(samples: list[Sample]) -> dict[str, Any]:
    """Milliseconds of wall and CPU time a frame."""
    wall = [sample.wall_ms for sample in samples]
    return {
        "p50_ms": statistics.median(wall),
        "p99_ms": float(np.percentile(wall, 99)),
        "cpu_ms": statistics.fmean(sample.cpu_ms for sample in samples),
        "calls": len(wall),
    }


def agreement(
    engines: Mapping[str, Engine],
    rivals: Mapping[str, TorchRival],
    frame: np.ndarray,
    missing: Mapping[str, str],
) -> dict[str, float]:
    """Share of pixels with the same label: engines with a rival of their precision.

    Without one, with the engine at float32.
    """
    labels = {name: engine.segment(frame).labels for name, engine in engines.items()}
    others = {
        name: rival.from_host(frame)
        for name, rival in rivals.items()
        if f"{name}, host to host" not in missing
    }
    shares = {}
    for precision, mine in labels.items():
        other = next((o for name, o in others.items() if name.endswith(f" {precision}")), None)
        other = labels.get("float32") if other is None else other
        if other is not None:
            shares[precision] = float((mine == other).mean())
    return shares


def measure_swaps(engine: Engine, text: np.ndarray, setting: Setting) -> dict[str, float]:
    """Median milliseconds of naming classes whose embeddings are at hand, the next frame apart."""
    medians, frame = {}, random_frame(setting.sizes_hw[0])
    for count in setting.class_counts:
        taken = []
        for turn in range(SWAPS):
            rows = np.ascontiguousarray(np.roll(text[:count], turn, axis=0))
            watch = Stopwatch()
            engine.set_classes(class_names(count), embeddings=rows)
            taken.append(watch.seconds * 1e3)
            engine.segment(frame)
        medians[str(count)] = statistics.median(taken)
    return medians


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report in human-readable form."""
    for section, content in report.items():
        if section == "cases":
            print_cases(content)
        elif isinstance(content, dict):
            print(f"\n{section}")
            for name, value in content.items():
                print(f"  {name:44} {f'{value:.4g}' if isinstance(value, float) else value}")
        else:
            print(f"{section}: {content}")


def print_cases(cases: list[dict[str, Any]]) -> None:
    """Print what was measured on a GPU, a line a candidate."""
    for case in cases:
        height, width = case["frame_hw"]
        print(f"\n{width}x{height}, {case['classes']} classes; ms: p50, p99, CPU time; launches")
        for name, row in case["candidates"].items():
            times = "".join(f"{row[key]:9.3f}" for key in ("p50_ms", "p99_ms", "cpu_ms"))
            print(f"  {name:34}{times}  {row['launches']}")
        for name, reason in case["missing"].items():
            print(f"  {name:34} missing: {reason}")


def torch_on_gpu() -> str | None:
    """Where torch computes on this machine's GPU; None if it is absent or sees none."""
    try:
        import torch
    except ImportError:
        return None
    return "cuda:0" if torch.cuda.is_available() else None


def loaded(*names: str) -> list[Any]:
    """Those modules that were imported."""
    return [sys.modules[name] for name in names if name in sys.modules]


def first_line(exc: BaseException) -> str:
    """An error's first line."""
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def read_gpu() -> Any:
    """Driver, clocks and power now, as gpu_check.sh records them."""
    sys.path.insert(0, str(ROOT / "tools" / "gpu_check"))
    try:
        import gpu_processes
    finally:
        del sys.path[0]
    return gpu_processes.read_gpu()


def set_classes(engine: Engine, text: np.ndarray, count: int) -> None:
    """Name the first classes."""
    engine.set_classes(class_names(count), embeddings=np.ascontiguousarray(text[:count]))


def random_text(embed_dim: int, count: int) -> np.ndarray:
    """Unit rows float32 [count, embed_dim]."""
    rows = np.random.default_rng(0).standard_normal((count, embed_dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_frame(size_hw: tuple[int, int]) -> np.ndarray:
    """A smooth frame uint8 [H, W, 3]."""
    planes = np.random.default_rng(0).uniform(0, 255, (1, 3, 12, 16)).astype(np.float32)
    return np.ascontiguousarray(
        reference.upsample_bilinear(planes, size_hw)[0].transpose(1, 2, 0).astype(np.uint8)
    )


def random_inputs(embed_dim: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth frame uint8 [480, 640, 3] and unit text embeddings [count, embed_dim]."""
    return random_frame(FRAME_HW), random_text(embed_dim, count)


def machine_and_commit() -> dict[str, str]:
    """CPU, versions and commit of a benchmark on the CPU."""
    import openvino

    return describe_machine(np, openvino, *loaded("torch")) | {"commit": describe_commit(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
