"""Run steps as processes with time limits, and read the GPU meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
MISSING_STATUS = 3  # of a step that could not run; its last line says why
SECONDS = "{seconds}"  # in a command: for how long it may begin something new
ENDING = 0.8  # share of the limit that this is; the rest is for what was begun
TAIL_LINES = 60
# Of nvidia-smi, with the names that the record uses.
GPU_QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.max.mem": "memory_max_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "memory.used": "memory_used_mb",
}


@dataclass(kw_only=True)
class Step:
    """Something to run.

    Attributes:
        name: For the record.
        command: What runs.
        limit: Seconds at most; less where less is left of the whole.
        missing: Why it cannot run; "" if it can.
        environment: Added to this process's.
        junit: Where pytest writes its counts.
        keeps: Whether its outcome holds in a later call that continues this one.
        watched: Whether the GPU's clocks and power are noted meanwhile.
    """

    name: str
    command: Sequence[str | Path] = ()
    limit: float = 60.0
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    junit: Path | None = None
    keeps: bool = True
    watched: bool = False


def run_step(step: Step, left: float, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run a step within its limit and the seconds left of the whole; returns what to record.

    ``tick`` is called every few seconds meanwhile, so that what a step has kept so far is seen.
    """
    missing = step.missing or ("" if left > 1.0 else "no time was left")
    if missing:
        print(f"\n== {step.name}: missing: {missing}", flush=True)
        return {"name": step.name, "state": "missing", "reason": missing}
    limit = min(step.limit, left)
    print(f"\n== {step.name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        status, readings = run_limited(step, limit, log, tick)
        log.seek(0)
        lines = log.read().replace(f"{ROOT}{os.sep}", "").splitlines()
    print("\n".join(lines[-TAIL_LINES:]), flush=True)
    states = {0: "passed", MISSING_STATUS: "missing"}
    outcome: dict[str, Any] = {"name": step.name, "state": states.get(status, "failed")}
    outcome["seconds"] = round(time.monotonic() - start, 1)
    if status is None and limit < step.limit:
        outcome |= {"state": "missing", "reason": f"only {limit:.0f} s were left"}
    elif status is None:
        outcome |= {"reason": f"took longer than {limit:.0f} s", "timed_out": True}
    elif status == MISSING_STATUS:
        outcome["reason"] = last_line("\n".join(lines))
    elif status != 0:
        outcome["reason"] = f"exit status {status}"
    if status != 0:
        outcome["output"] = lines[-TAIL_LINES:]
    if step.junit is not None:
        outcome["tests"] = read_counts(step.junit)
    if step.watched:
        outcome["gpu"] = summarise(readings)
    return outcome


def run_limited(
    step: Step, limit: float, log: Any, tick: Callable[[], None]
) -> tuple[int | None, list[dict[str, float | str | None]]]:
    """Run a command in a group of its own, which is killed at the limit: status None then."""
    values = {SECONDS: str(int(ENDING * limit))}
    command = [values.get(str(part), str(part)) for part in step.command]
    # The checkout's own package comes first, also for scripts in other folders.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **step.environment}
    readings = []
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        print(error, file=log)
        return 127, []
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(2.0, max(0.0, end - time.monotonic()))), readings
            if step.watched:
                readings.append(read_gpu())
            tick()
        return None, readings
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines with the checkout's package."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code]
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer in two minutes")


def why_python_fails(code: str, **environment: str) -> str:
    """The last line of what a few lines say where they fail; "" if they do not."""
    done = run_python(code, **environment)
    return "" if done.returncode == 0 else last_line(done.stderr)


def run_quietly(*command: str) -> str | None:
    """The output of a command; None if it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def read_gpu() -> dict[str, float | str | None]:
    """Driver, clocks, power and memory now; None for what nvidia-smi does not tell."""
    query = f"--query-gpu={','.join(GPU_QUERY)}"
    output = run_quietly("nvidia-smi", query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output else []
    values += [""] * (len(GPU_QUERY) - len(values))
    named = dict(zip(GPU_QUERY.values(), values, strict=False))
    driver = named.pop("driver")
    return {"driver": driver or None} | {key: to_number(text) for key, text in named.items()}


def name_gpu() -> str | None:
    """The first GPU's name, or the board's on a Jetson; None without one."""
    # A Jetson has no complete nvidia-smi but is known by its release file.
    if Path("/etc/nv_tegra_release").exists():
        with contextlib.suppress(OSError):
            return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n ")
        return "Jetson"
    listed = run_quietly("nvidia-smi", "-L")
    if not listed:
        return None
    match = re.match(r"GPU \d+: (.*?) \(UUID", listed)
    return match[1] if match else listed.splitlines()[0]


def to_number(text: str) -> float | None:
    """A figure of nvidia-smi; "[N/A]" and the like are none."""
    try:
        return float(text)
    except ValueError:
        return None


def summarise(readings: Sequence[Mapping[str, float | str | None]]) -> dict[str, float]:
    """Median of each figure over the readings taken during a step."""
    figures: dict[str, list[float]] = {}
    for reading in readings:
        for key, value in reading.items():
            if isinstance(value, float):
                figures.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in figures.items()}


def read_counts(junit: Path) -> dict[str, Any] | None:
    """Pytest's counts and why tests were skipped; None if it did not come to write them."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    suites = list(root.iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name) or 0) for suite in suites) for name in names}
    reasons = sorted({skip.get("message") or "" for skip in root.iter("skipped")})
    return counts | {"skip_reasons": reasons}
