"""The benchmark of refinement: its measure of outlines, and that it runs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "refine.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_refine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def square(left):
    labels = np.full((100, 100), 255, np.uint8)
    labels[30:70, left : left + 40] = 3
    return labels


@pytest.mark.parametrize(("left", "fit"), [(30, 1.0), (31, 1.0), (50, (0.2, 0.6)), (75, (0, 0.3))])
def test_outlines_fit_where_they_are_near(benchmark, left, fit):
    (found,) = benchmark.boundary_fits(square(left)[:, :100], square(30), 0.0075)
    low, high = fit if isinstance(fit, tuple) else (fit, fit)
    assert low <= found <= high


def test_quick_run_reports_both_ways(benchmark, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert benchmark.main(["--quick", "--scenes", "3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == report
    scenes = report["sets"]["scenes"]
    assert scenes["pictures"] == 3
    assert scenes["None"].keys() == scenes["bilateral"].keys()
    assert scenes["bilateral"]["F 0.75 %"] > scenes["None"]["F 0.75 %"]
    assert "refine" in report["times_ms"]["photos, 20 names"]["bilateral"]
    assert "refine" not in report["times_ms"]["photos, 20 names"]["None"]
