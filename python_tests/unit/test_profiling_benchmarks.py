"""Benchmarks measure with one sampler."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "benchmarks").rglob("*.py")), ROOT / "tools" / "benchmark_kernels.py"]
# These tell how old a frame is: they need the clock by which it was captured.
AGES = {"follow.py", "stream.py"}
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time_ns", "timeit"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_benchmarks_read_no_clock_of_their_own(script):
    names = {
        getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    }
    allowed = {"monotonic"} if script.name in AGES else set()
    assert not names & CLOCKS - allowed
