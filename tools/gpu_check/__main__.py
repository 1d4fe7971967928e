"""Check everything that needs a GPU and write one record; see ../gpu_check.sh.

Nothing here imports the package: it may have to be built first, and a crash on the GPU must not end
the check. Each step is a process of its own with a time limit. Python runs this folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_models import find_model
from gpu_processes import ROOT, Step, last_line, name_gpu, read_gpu, run_python, run_step
from gpu_record import COPY, Record
from gpu_steps import GROUPS, build_steps, check_steps

DEVICE_FACTS = """
import json
from zsseg_rt import ops
if ops.cuda_device_count() == 0:
    raise SystemExit(4)
print(json.dumps(ops.cuda_device_properties(0) | {"cuda_runtime": ops.cuda_runtime_version()}))
"""


class GiveUpError(Exception):
    """Nothing can be checked here."""


def main(arguments: list[str] | None = None) -> int:
    """Run all steps and write the record; returns the exit status that gpu_check.sh names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the running step ends too
    args = parse_arguments(arguments)
    end = time.monotonic() + 60.0 * args.minutes
    try:
        gpu = check_needs(args)
        earlier = read_earlier(args)
        prepare_folder(args.work, keep=earlier is not None)
        record = Record(gpu, read_gpu(), args.out, args.work, earlier)
        if not args.no_build and not run_steps(build_steps(args), record, end):
            print("gpu_check: the build failed; nothing was checked", file=sys.stderr)
            return 1
        record.content |= read_device()
        args.model = find_model(args.bundle, args.work, quick=args.quick)
        run_steps(check_steps(args), record, end)
    except GiveUpError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 4
    return report(record)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="use what was built before")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results",
                        metavar="FOLDER", help="where the record goes")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M",
                        help="in all; with fewer, later steps are left out")  # fmt: skip
    parser.add_argument("--bundle", type=Path, metavar="FOLDER",
                        help="what prepare.sh wrote; default: build/gpu_check/models")  # fmt: skip
    parser.add_argument("--continue", dest="earlier", action="store_true",
                        help="leave out what the last call has done")  # fmt: skip
    parser.add_argument("--only", action="append", choices=GROUPS,
                        help="a group of steps; may be repeated")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few tests, tiny benchmarks")
    parser.add_argument("--program", type=Path, help="zsseg_cuda_tests, built before")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check",
                        metavar="FOLDER", help="what steps keep")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.minutes <= 0.0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes:g}")
    args.work = args.work.absolute()
    args.bundle = (args.bundle or args.work / "models").absolute()
    return args


def check_needs(args: argparse.Namespace) -> str:
    """Return the GPU's name; raise unless there are one, NumPy and a way to the extension."""
    gpu = name_gpu()
    if gpu is None:
        raise GiveUpError(
            "expected an NVIDIA GPU and its driver, got none: nothing was checked. Run this on a "
            "computer with a GPU."
        )
    if importlib.util.find_spec("numpy") is None:
        raise GiveUpError(
            f"expected the package numpy in {sys.executable}, got nothing. Install it, or name "
            "another interpreter with ZSSEG_PYTHON."
        )
    if not args.no_build and not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
        raise GiveUpError(
            "expected nvcc on PATH (often /usr/local/cuda/bin) or in CUDACXX, got neither. Install "
            "the CUDA toolkit, or use an extension that was built before: --no-build."
        )
    return gpu


def read_earlier(args: argparse.Namespace) -> dict[str, Any] | None:
    """The record that this call continues, if it shall continue one."""
    if not args.earlier:
        return None
    try:
        record: dict[str, Any] = json.loads((args.work / COPY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise GiveUpError(f"--continue: expected the last call's record, got: {exc}") from exc
    return record


def prepare_folder(work: Path, *, keep: bool) -> None:
    """Make the working folder; what an earlier run measured goes, unless this continues it."""
    if not keep:
        shutil.rmtree(work / "results", ignore_errors=True)
    (work / "results").mkdir(parents=True, exist_ok=True)


def run_steps(steps: Iterable[Step], record: Record, end: float) -> bool:
    """Run steps, of which an earlier call did some; returns whether all passed."""
    passed = True
    for step in steps:
        outcome = record.earlier_outcome(step.name) if step.keeps else None
        if outcome is None:
            outcome = run_step(step, end - time.monotonic(), record.save)
            record.add(outcome)
        passed = passed and outcome["state"] == "passed"
    return passed


def read_device() -> Mapping[str, Any]:
    """Size of the GPU that the extension sees."""
    done = run_python(DEVICE_FACTS)
    if done.returncode != 0:
        reason = last_line(done.stderr) if done.stderr.strip() else "it sees no CUDA device"
        raise GiveUpError(
            f"expected an extension that sees this GPU, got: {reason}. The driver may be older "
            "than the CUDA that built it; build it here, without --no-build."
        )
    facts: dict[str, Any] = json.loads(done.stdout)
    return {
        "device": facts["name"],
        "compute_capability": facts["compute_capability"],
        "memory_bytes": facts["total_memory"],
        "cuda_runtime": facts["cuda_runtime"],
    }


def report(record: Record) -> int:
    """Say how it went; returns the exit status."""
    content = record.content
    print(f"\nwrote {record.file}")
    for row in content["expected"]:
        if row["state"] == "off":
            wanted = [f"{word.replace('_', ' ')} {row[word]:g}"
                      for word in ("at_least", "at_most") if word in row]  # fmt: skip
            print(f"off: {row['name']}: expected {' and '.join(wanted)}, got {row['measured']:g}")
    if content["failed"]:
        print(f"gpu_check: failed: {', '.join(content['failed'])}", file=sys.stderr)
        return 1
    if content["missing"]:
        print(f"gpu_check: nothing failed, but could not run: {', '.join(content['missing'])}")
        return 3
    print("gpu_check: all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
