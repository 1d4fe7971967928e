"""Profile with NVIDIA's tools, and keep of it what a record needs: names, times, shares.

Exit status 3 says that the tool may not or cannot look here.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent / "gpu_target.py"
METRICS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "launch__waves_per_multiprocessor": "waves",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
}
REPORTS = ("cuda_gpu_kern_sum", "cuda_api_sum", "cuda_gpu_mem_time_sum")
# A tool that says one of these found nothing wrong: it is not let in.
REFUSALS = (
    "ERR_NVGPUCTRPERM",
    "LibraryNotLoaded",
    "Device not supported",
    "insufficient privilege",
)


class ToolRefusedError(Exception):
    """The tool may not look at this GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Profile, print and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nsys", help="its program: profile one replayed frame")
    parser.add_argument("--ncu", help="its program: look into single kernels")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the tools' files")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args, target = parser.parse_known_args(arguments)
    try:
        outcome = profile_frame(args, target) if args.nsys else profile_kernels(args, target)
    except ToolRefusedError as error:
        print(error)
        return 3
    print(json.dumps(outcome, indent=1))
    args.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0


def profile_frame(args: argparse.Namespace, target: Sequence[str]) -> dict[str, Any]:
    """Kernels, calls and copies of one replayed frame."""
    report = args.scratch / "frame.nsys-rep"
    run(
        [args.nsys, "profile", "--trace=cuda", "--cuda-graph-trace=node", "--sample=none",
         "--cpuctxsw=none", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
         "--force-overwrite=true", f"--output={report}", sys.executable, TARGET, "frame", *target]
    )  # fmt: skip
    if not report.is_file():
        raise ToolRefusedError("nsys wrote no report")
    tables = {}
    for name in REPORTS:
        text = run([args.nsys, "stats", "--force-export=true", "--format=csv",
                    f"--report={name}", report])  # fmt: skip
        tables[name] = [dict(row) for row in read_table(text, "Time (%)")]
    return tables


def profile_kernels(args: argparse.Namespace, target: Sequence[str]) -> dict[str, Any]:
    """Each launch's time, occupancy and shares of the peaks; the GPU's clocks stay as they are."""
    log = args.scratch / "kernels.csv"
    run(
        [args.ncu, "--clock-control=none", "--csv", "--page=raw", f"--log-file={log}",
         f"--metrics={','.join(METRICS)}", sys.executable, TARGET, "kernels", *target],
        log,
    )  # fmt: skip
    first, *rows = read_table(log.read_text(encoding="utf-8"), '"ID"')
    kernels = [
        {"kernel": row["Kernel Name"], **{short: row.get(name) for name, short in METRICS.items()}}
        for row in rows
    ]
    units = {short: first.get(name) for name, short in METRICS.items()}
    return {"kernels": kernels, "units": units}


def run(command: Sequence[str | Path], log: Path | None = None) -> str:
    """Run a tool; returns what it printed.

    Raises:
        ToolRefusedError: It is not let in.
        SystemExit: It failed.
    """
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    if log is not None and log.is_file():
        output += log.read_text(encoding="utf-8", errors="replace")
    refusal = next((line for line in output.splitlines() if any(r in line for r in REFUSALS)), None)
    if refusal is not None:
        raise ToolRefusedError(refusal)
    if done.returncode != 0:
        print(output)
        raise SystemExit(done.returncode)
    return done.stdout


def read_table(text: str, begin: str) -> list[dict[str, str]]:
    """The rows of a CSV table that follows other lines; none if there is no table."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith(begin)), len(lines))
    return list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))


if __name__ == "__main__":
    sys.exit(main())
