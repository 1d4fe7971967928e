"""Settings against each other, one at a time: waits, times, captures, lanes, tiles.

Each row is kept as soon as it is measured. The engine's rows are of one 512x512 frame of 20
classes; kernels' rows cross the sizes at which they change their tiles, with and without shared
depth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import PLAN, first_line, random_frame, random_text, set_classes, summarise

from tools import benchmark_kernels
from tools.kernels.benches import CpuBench, CudaBench
from tools.kernels.product_cases import descriptor_case, similarity_case
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.common.files import write_whole
from zsseg_rt.profiling.turns import take_turns_locally
from zsseg_rt.profiling.worker import Stopwatch

CLASSES = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "as is": {},
    "wait=spin": {"wait": "spin"},
    "wait=sleep": {"wait": "sleep"},
    "with_times=True": {"with_times": True},
    "no captures": {"captures": "0"},
}
TILE_CLASSES = (16, 64, 128, 171, 256, 384, 512, 768, 1024)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything that time is left for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="of a ZegCLIP; without it, kernels alone")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row later")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    watch, rows = Stopwatch(), []
    for name, measure in planned(args):
        row: dict[str, Any] = {"name": name}
        if watch.seconds > args.seconds:
            row["missing"] = "no time was left"
        else:
            try:
                row |= measure()
            except Exception as exc:  # noqa: BLE001 - the other rows are still of use
                row["failed"] = f"{type(exc).__name__}: {first_line(exc)}"
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            write_whole(args.json, (json.dumps({"rows": rows}, indent=2) + "\n").encode())
    return 1 if any("failed" in row for row in rows) else 0


def planned(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Rows by name, in the order of what they tell."""
    if args.bundle is not None:
        for name, settings in SETTINGS.items():
            yield name, lambda settings=settings: engine_row(args, settings)
        yield "two lanes in two threads", lambda: lanes_row(args)
    bench = CudaBench(1) if args.device.startswith("cuda") else CpuBench(1)
    for classes in TILE_CLASSES[:1] if args.quick else TILE_CLASSES:
        for shared in (True, False):
            words = f"{classes} classes, depth {'shared' if shared else 'whole'}"
            for kind in ("similarity", "descriptor"):
                yield (
                    f"{kind}, {words}",
                    lambda kind=kind, classes=classes, shared=shared: kernel_row(
                        bench, kind, classes, shared, quick=args.quick
                    ),
                )


@contextlib.contextmanager
def opened(args: argparse.Namespace, settings: Mapping[str, Any]) -> Iterator[Engine]:
    """An engine with classes; ``captures`` is of the environment."""
    fields = dict(settings)
    before = os.environ.get("ZSSEG_CUDA_GRAPHS")
    if "captures" in fields:
        os.environ["ZSSEG_CUDA_GRAPHS"] = fields.pop("captures")
    config = EngineConfig(device=args.device, backend=args.backend, **fields)
    try:
        with Engine(args.bundle, config) as engine:
            dim = Bundle.load(args.bundle).text.embed_dim
            set_classes(engine, random_text(dim, CLASSES), CLASSES)
            yield engine
    finally:
        os.environ.pop("ZSSEG_CUDA_GRAPHS", None)
        if before is not None:
            os.environ["ZSSEG_CUDA_GRAPHS"] = before


def engine_row(args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A frame from host to host."""
    frame = random_frame((30, 40) if args.quick else (512, 512))
    with opened(args, settings) as engine:
        taken = take_turns_locally(
            {"frame": lambda: engine.segment(frame)},
            rounds=1 if args.quick else 20,
            plan=PLAN,
            max_seconds=3.0,
        )
        return summarise(taken.warm("frame")) | {"precision": engine.precision}


def lanes_row(args: argparse.Namespace) -> dict[str, Any]:
    """Frames a second of one lane, and of two at once."""
    frame, count = (
        random_frame((30, 40) if args.quick else (512, 512)),
        2 if args.quick else 200,
    )
    with opened(args, {"num_lanes": 2}) as engine, engine.lane() as lane:
        figures = {}
        for name, lanes in (("one", (engine,)), ("two", (engine, lane))):
            for each in lanes:
                each.segment(frame)

            def work(each: Any) -> None:
                for _ in range(count):
                    each.segment(frame)

            threads = [threading.Thread(target=work, args=(each,)) for each in lanes]
            watch = Stopwatch()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            figures[f"{name}_frames_per_second"] = count * len(lanes) / watch.seconds
        return figures


def kernel_row(
    bench: CpuBench, kind: str, classes: int, shared: bool, *, quick: bool
) -> dict[str, Any]:
    """A product in half precision; without ``shared``, each block takes its tile's whole depth."""
    patches, dim, outputs = (16, 32, 48) if quick else (1024, 512, 768)
    rng, memory = np.random.default_rng(0), bench.zeros
    half = [
        rng.standard_normal(shape, np.float32).astype(np.float16)
        for shape in ((1, patches, dim), (classes, dim), (1, dim), (outputs, 2 * dim))
    ]
    if not shared:  # too little memory for sums, enough for what "finite" needs
        bench.zeros = lambda: bench.place(np.zeros(8, np.uint8))  # type: ignore[method-assign]
    try:
        if kind == "similarity":
            case = similarity_case(bench, half[0], half[1], in_frame=True)
        else:
            bias = np.zeros(outputs, np.float32)
            case = descriptor_case(bench, [half[2], half[1], half[3], bias], in_frame=True)
    finally:
        bench.zeros = memory  # type: ignore[method-assign]
    rounds = 1 if quick else 5
    floor = {"copy_gigabytes_per_second": math.inf, "product_teraflops": math.inf}
    capturing = bench.name == "cuda" and bench.torch
    result = benchmark_kernels.run_case(bench, (case,), rounds, floor if capturing else None)
    captured = (result["captured"] or {}).get("median_ms", {})
    return {"us": 1e3 * captured.get("zsseg_rt", result["median_ms"]["zsseg_rt"]),
            "captured": "zsseg_rt" in captured}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
