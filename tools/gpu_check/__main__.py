"""Check everything that needs a GPU and write one record; see ../gpu_check.sh.

Nothing here imports the package: it may have to be built first, and a crash on the GPU must not end
the check. Each step is a process of its own with a time limit. Python runs this folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_processes import ROOT, last_line, read_gpu, run_python, run_quietly, run_step
from gpu_steps import build_steps, check_steps

RECORD_FORMAT = 1
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
    args = parse_arguments(arguments)
    began = time.monotonic()
    try:
        check_needs(args)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            before = read_gpu()
            outcomes = []
            if not args.no_build:
                outcomes = [run_step(step, began) for step in build_steps(work)]
                if any(outcome["state"] != "passed" for outcome in outcomes):
                    print("gpu_check: the build failed; nothing was checked", file=sys.stderr)
                    return 1
            facts = read_device()
            outcomes += [run_step(step, began) for step in check_steps(args, work)]
            record = make_record(facts, before, outcomes, work)
    except GiveUpError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 4
    target = write_record(record, args.out)
    return report(record, target)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="use what was built before")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results",
                        metavar="FOLDER", help="where the record goes")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few tests, tiny benchmarks")
    parser.add_argument("--program", type=Path, help="zsseg_cuda_tests, built before")
    return parser.parse_args(arguments)


def check_needs(args: argparse.Namespace) -> None:
    """Raise unless there are a GPU, the packages and a way to the extension."""
    gpu = run_quietly("nvidia-smi", "-L") is not None
    # A Jetson has no complete nvidia-smi but is known by its release file.
    if not gpu and not Path("/etc/nv_tegra_release").exists():
        raise GiveUpError(
            "expected an NVIDIA GPU and its driver, got none: nothing was checked. Run this on a "
            "computer with a GPU."
        )
    for package in ("numpy", "torch", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise GiveUpError(
                f"expected the package {package} in {sys.executable}, got nothing. Install it, or "
                "name another interpreter with ZSSEG_PYTHON."
            )
    if not args.no_build and not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
        raise GiveUpError(
            "expected nvcc on PATH (often /usr/local/cuda/bin) or in CUDACXX, got neither. Install "
            "the CUDA toolkit, or use an extension that was built before: --no-build."
        )


def read_device() -> dict[str, Any]:
    """Name and size of the GPU that the extension sees."""
    done = run_python(DEVICE_FACTS)
    if done.returncode != 0:
        reason = last_line(done.stderr) if done.stderr.strip() else "it sees no CUDA device"
        raise GiveUpError(
            f"expected an extension that sees this GPU, got: {reason}. The driver may be older "
            "than the CUDA that built it; build it here, without --no-build."
        )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def make_record(
    facts: Mapping[str, Any],
    before: Mapping[str, Any],
    outcomes: Sequence[Mapping[str, Any]],
    work: Path,
) -> dict[str, Any]:
    """Everything that is worth keeping of a run."""
    named = {state: [o["name"] for o in outcomes if o["state"] == state]
             for state in ("failed", "missing")}  # fmt: skip
    changes = run_quietly("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    benchmarks = {}
    for name in ("kernels", "engine"):
        file = work / f"{name}.json"
        benchmarks[name] = json.loads(file.read_text()) if file.is_file() else None
    return {
        "format": RECORD_FORMAT,
        "gpu": facts["name"],
        "compute_capability": facts["compute_capability"],
        "memory_bytes": facts["total_memory"],
        "driver": before["driver"],
        "cuda_runtime": facts["cuda_runtime"],
        "before": {key: value for key, value in before.items() if key != "driver"},
        "commit": run_quietly("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "passed": not named["failed"] and not named["missing"],
        **named,
        "steps": list(outcomes),
        "benchmarks": benchmarks,
    }


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write ``<gpu>-<date>.json``; a second one of a day gets a number."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(record["gpu"]).lower()).strip("-")
    stem = f"{gpu}-{record['date'][:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    target, count = folder / f"{stem}.json", 1
    while target.exists():
        count += 1
        target = folder / f"{stem}-{count}.json"
    target.write_text(json.dumps(record, indent=2) + "\n")
    return target


def report(record: Mapping[str, Any], target: Path) -> int:
    """Say how it went; returns the exit status."""
    print(f"\nwrote {target}")
    if record["failed"]:
        print(f"gpu_check: failed: {', '.join(record['failed'])}", file=sys.stderr)
        return 1
    if record["missing"]:
        print(f"gpu_check: nothing failed, but could not run: {', '.join(record['missing'])}")
        return 3
    print("gpu_check: all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
