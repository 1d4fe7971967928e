"""The target of profilers: one replayed frame, or one launch of each of five kernels."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import random_frame, random_text, set_classes

from tools.kernels import frame_cases, product_cases
from tools.kernels.benches import CpuBench, CudaBench
from zsseg_rt import Bundle, Engine, EngineConfig

KERNELS = (
    frame_cases.preprocess_cases,
    product_cases.descriptor_cases,
    product_cases.similarity_cases,
    frame_cases.upsample_cases,
)
WARM_FRAMES = 8
CLASSES = 20


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("frame", "kernels"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="let torch's profiler look at the frame")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.what == "frame":
        replay_a_frame(args)
    else:
        launch_kernels(args)
    return 0


def replay_a_frame(args: argparse.Namespace) -> None:
    """Label frames until they are recorded; profilers see the last one alone."""
    frame = random_frame((30, 40) if args.quick else (512, 512))
    config = EngineConfig(device=args.device, backend=args.backend)
    with Engine(args.bundle, config) as engine:
        dim = Bundle.load(args.bundle).text.embed_dim
        set_classes(engine, random_text(dim, CLASSES), CLASSES)
        for _ in range(WARM_FRAMES):
            engine.segment(frame)
        if args.json:
            kernels = profile_call(lambda: engine.segment(frame))
            args.json.write_text(json.dumps({"kernels": kernels}, indent=2) + "\n")
            return
        driver = load_driver()
        if driver is not None:
            driver.cuProfilerStart()
        engine.segment(frame)
        if driver is not None:
            driver.cuProfilerStop()


def profile_call(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """A call's kernels on the GPU, anybody's: count and microseconds, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    rows: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            rows.setdefault(event.name, []).append(event.time_range.elapsed_us())
    kernels = [{"name": name, "count": len(each), "us": sum(each)} for name, each in rows.items()]
    return sorted(kernels, key=lambda row: -float(row["us"]))


def load_driver() -> Any:
    """CUDA's driver; None on a machine that has none, such as one that emulates it."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def launch_kernels(args: argparse.Namespace) -> None:
    """Compare each kernel's largest plain case with the reference, which launches it once."""
    bench = CudaBench(1) if args.device.startswith("cuda") else CpuBench(1)
    for cases in KERNELS:
        for case in itertools.islice(cases(bench, quick=args.quick), 3):
            print(case.op, case.sizes, flush=True)
            case.check()


if __name__ == "__main__":
    sys.exit(main())
