"""Measure every operation against torch and OpenCV, side by side in one run.

    python tools/benchmark_kernels.py [--op NAME] [--device auto|cpu|cuda] [--threads N] [--json F]

Each result is first compared with ops.reference; a wrong kernel is not timed (exit status 1). The
report is written after every case. Then
all candidates of a case take turns, round by round, so that a busy moment affects all of them,
and the medians are printed: milliseconds, gigabytes of inputs and outputs per second, and how many
times faster the kernel is than each rival. A turn is a pause, a cold call, warm-up calls, and
a warm one: a call in a loop over one kernel is warm, one that follows a network in a frame is cold.
Rivals that are not installed are left out.

On CUDA a call between two events is mostly Python and its launch. So 100 launches that take turns
on several sets of buffers are captured, and their replay is timed too: milliseconds a launch, and
the share of the floor, which is the time to move the bytes at the speed of a large copy or to
do the products at that of a large one, both measured in the same run. Captures need torch with
CUDA; what cannot be captured is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from tools.kernels import frame_cases, product_cases, region_cases
from tools.kernels.benches import (
    LAUNCHES,
    CaptureRefusedError,
    Case,
    CpuBench,
    CudaBench,
    MismatchError,
    capture_launches,
)
from zsseg_rt import ops
from zsseg_rt.common.files import write_whole
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.turns import take_turns_locally
from zsseg_rt.profiling.worker import Stopwatch, TurnPlan

ROOT = Path(__file__).resolve().parents[1]
SLOW_SECONDS = 10.0  # a case takes this much per candidate at most
TURN = TurnPlan(pause_ms=5.0, warming_ms=10.0, measuring_ms=0.0)

CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "preprocess": frame_cases.preprocess_cases,
    "relationship_descriptor": product_cases.descriptor_cases,
    "patch_text_similarity": product_cases.similarity_cases,
    "upsample_argmax": frame_cases.upsample_cases,
    "overlay": frame_cases.overlay_cases,
    "ink": frame_cases.ink_cases,
    "mask_boxes": region_cases.box_cases,
    "crop_regions": region_cases.crop_cases,
    "label_regions": region_cases.region_cases,
    "all_finite": frame_cases.finite_cases,
    "count_labels": frame_cases.count_cases,
    "warp_blend": product_cases.warp_cases,
}


def measure(bench: CpuBench, case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every candidate's ``warm`` and ``cold`` calls, in turns."""
    taken = take_turns_locally(
        case.candidates,
        rounds=rounds,
        plan=TURN,
        device_timer=bench.timer,
        max_seconds=SLOW_SECONDS * len(case.candidates),
    )
    return {
        state: {name: taken.median_ms(name, cold=state == "cold") for name in case.candidates}
        for state in ("cold", "warm")
    }


def measure_floor(bench: CpuBench, rounds: int, *, quick: bool) -> dict[str, float]:
    """Gigabytes a second of a large copy, and float32 operations a second of a large product."""
    torch, count, side = bench.torch, (1 << 16) if quick else (1 << 26), 256 if quick else 4096
    source, target = (torch.zeros(count, device="cuda") for _ in range(2))
    left, right = (torch.zeros(side, side, device="cuda") for _ in range(2))
    out = torch.zeros(side, side, device="cuda")
    calls = {"copy": lambda: target.copy_(source),
             "product": lambda: torch.matmul(left, right, out=out)}  # fmt: skip
    replays = {
        name: capture_launches(torch, [call], stream=bench.stream, launches=10)
        for name, call in calls.items()
    }
    taken = take_turns_locally(replays, rounds=rounds, plan=TURN, device_timer=bench.timer)
    copied = 10 * 2 * 4 * count / (taken.median_ms("copy") / 1e3)
    multiplied = 10 * 2 * side**3 / (taken.median_ms("product") / 1e3)
    return {"copy_gigabytes_per_second": copied / 1e9, "product_teraflops": multiplied / 1e12}


def try_floor(bench: CpuBench, rounds: int, *, quick: bool) -> dict[str, float] | None:
    """The floor, or None and a word why nothing is captured."""
    problem = "torch with CUDA is not installed"
    if bench.torch:
        try:
            return measure_floor(bench, rounds, quick=quick)
        except CaptureRefusedError as error:
            problem = f"a plain copy or product was refused: {error}"
    print(f"no captures: {problem}. Times hold Python and the launch.")
    return None


def measure_captures(
    bench: CpuBench, cases: tuple[Case, ...], rounds: int, floor: dict[str, float]
) -> dict[str, Any]:
    """Milliseconds a launch of what can be captured, and why the others cannot."""
    replays, refused = {}, {}
    for name in cases[0].candidates:
        calls = [case.candidates[name] for case in cases]
        try:
            replays[name] = capture_launches(bench.torch, calls, stream=bench.stream)
        except CaptureRefusedError as error:
            refused[name] = str(error)
            cases[0].check()  # it must work as before
    figures: dict[str, Any] = {"sets": len(cases), "rotated_bytes": len(cases) * cases[0].num_bytes}
    figures |= {"launches": LAUNCHES, "median_ms": {}, "not_captured": refused}
    if replays:
        seconds = SLOW_SECONDS * len(replays)
        taken = take_turns_locally(replays, rounds=rounds, plan=TURN, device_timer=bench.timer,
                                   max_seconds=seconds)  # fmt: skip
        figures["median_ms"] = {name: taken.median_ms(name) / LAUNCHES for name in replays}
    moved_ms = cases[0].num_bytes / floor["copy_gigabytes_per_second"] / 1e6
    computed_ms = cases[0].flops / floor["product_teraflops"] / 1e9
    figures["floor_ms"] = max(moved_ms, computed_ms)
    if "zsseg_rt" in figures["median_ms"]:
        figures["share_of_floor"] = figures["floor_ms"] / figures["median_ms"]["zsseg_rt"]
    return figures


def run_case(
    bench: CpuBench, cases: tuple[Case, ...], rounds: int, floor: dict[str, float] | None
) -> dict[str, Any]:
    """Check, measure and describe one case, which is given once for each set of buffers."""
    case = cases[0]
    case.check()
    captures = None if floor is None else measure_captures(bench, cases, rounds, floor)
    medians = measure(bench, case, rounds)
    faster = {
        state: {name: ms / taken["zsseg_rt"] for name, ms in taken.items() if name != "zsseg_rt"}
        for state, taken in medians.items()
    }
    return {
        "op": case.op,
        "sizes": case.sizes,
        "median_ms": medians["warm"],
        "cold_median_ms": medians["cold"],
        "gigabytes_per_second": case.num_bytes / medians["warm"]["zsseg_rt"] / 1e6,
        "times_faster_than": faster["warm"],
        "cold_times_faster_than": faster["cold"],
        "captured": captures,
    }


def machine_of(bench: CpuBench) -> dict[str, str]:
    """Say what the figures were measured on."""
    modules = [module for module in (bench.torch, bench.cv2) if module]
    machine = describe_machine(*modules) | {"isa": ops.cpu_isa()}
    if bench.name == "cuda":
        machine["gpu"] = str(ops.cuda_device_properties(0))
    return machine


def print_result(result: dict[str, Any]) -> None:
    """Print one case: its sizes, then warm and cold calls."""
    print(f"{result['op']}  {result['sizes']}")
    for state, prefix in (("warm", ""), ("cold", "cold_")):
        medians, faster = result[f"{prefix}median_ms"], result[f"{prefix}times_faster_than"]
        rivals = ", ".join(
            f"{name} {medians[name]:.3g} ms ({ratio:.1f}x)" for name, ratio in faster.items()
        )
        speed = f"    {state} {medians['zsseg_rt']:.3f} ms"
        if state == "warm":
            speed += f", {result['gigabytes_per_second']:.1f} GB/s"
        print(f"{speed}; {rivals or 'no rival installed'}")
    if result["captured"] is not None:
        print_captured(result["captured"])


def print_captured(captured: dict[str, Any]) -> None:
    """Print microseconds a launch, and what could not be captured."""
    shown = ", ".join(f"{name} {1e3 * ms:.3g} us" for name, ms in captured["median_ms"].items())
    floor = f"floor {1e3 * captured['floor_ms']:.3g} us"
    if "share_of_floor" in captured:
        floor += f", {captured['share_of_floor']:.0%} of its speed"
    sets = f"{captured['sets']} sets of buffers, {captured['rotated_bytes'] / 1e6:.1f} MB"
    print(f"    captured {shown or 'nothing'}; {floor}; {sets}")
    for name, reason in captured["not_captured"].items():
        print(f"    {name}: not captured, only timed call by call: {reason}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=ops.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="T",
                        help="begin no operation later")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds: expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; return 0, or 1 for a wrong result, or 4 without the device."""
    args = parse_arguments(arguments)
    has_cuda = ops.cuda_device_count() > 0
    if args.device == "cuda" and not has_cuda:
        print("--device: expected a CUDA device, got none. Use --device cpu.", file=sys.stderr)
        return 4
    on_cuda = has_cuda and args.device != "cpu"
    bench = CudaBench(args.threads) if on_cuda else CpuBench(args.threads)
    rounds = 2 if args.quick else args.rounds
    floor = try_floor(bench, rounds, quick=args.quick) if on_cuda else None
    report: dict[str, Any] = {"device": bench.name, "threads": args.threads, "rounds": rounds}
    report |= {"floor": floor, "machine": machine_of(bench), "commit": describe_commit(ROOT)}
    report["results"], report["not_measured"] = [], []
    watch = Stopwatch()
    for op in args.op or CASES:
        if watch.seconds > args.seconds:
            report["not_measured"].append(op)
        else:
            run_operation(bench, op, rounds, report, args)
        write_report(report, args.json)
    if report["not_measured"]:
        print(f"no time was left for: {', '.join(report['not_measured'])}")
    return 1 if any("failed" in result for result in report["results"]) else 0


def run_operation(
    bench: CpuBench, op: str, rounds: int, report: dict[str, Any], args: argparse.Namespace
) -> None:
    """Add an operation's cases to the report, and keep the report after each."""
    floor = report["floor"]
    sets = (CASES[op](bench, quick=args.quick) for _ in range(bench.sets if floor else 1))
    for cases in zip(*sets, strict=True):
        try:
            result = run_case(bench, cases, rounds, floor)
            print_result(result)
        except MismatchError as error:
            result = {"op": op, "sizes": cases[0].sizes, "failed": str(error)}
            print(f"{op} {cases[0].sizes}: {error}", file=sys.stderr)
        report["results"].append(result)
        write_report(report, args.json)


def write_report(report: dict[str, Any], file: Path | None) -> None:
    """Keep what was measured so far."""
    if file:
        write_whole(file, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
