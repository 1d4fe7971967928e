"""The benchmark of windows runs and counts them."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "windows.py"


def test_quick_run_counts_windows(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_windows", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "report.json"
    assert module.main(["--frame", "200x100", "--rounds", "1", "--json", str(file)]) in (0, 1)
    ways = json.loads(file.read_text())["ways"]
    assert {name: way["windows"] for name, way in ways.items()} == {
        "stretch": 1,
        "letterbox": 1,
        "windows": 3,
    }
    assert all(way["ratio"] > 0 for way in ways.values())
