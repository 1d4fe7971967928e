"""The benchmark of heads times both encoders and compares them."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "head_cost.py"


def test_a_quick_trial_compares_encoders(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    spec = importlib.util.spec_from_file_location("benchmark_head_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = tmp_path / "report.json"
    quick = ["--size", "64", "--width", "64", "--seconds", "1", "--precision", "float32"]
    assert module.main([*quick, "--json", str(file)]) in (0, 1)
    row = json.loads(file.read_text())["precisions"]["float32"]
    assert row["precision"] == "float32"
    assert row["rounds"] >= 1
    assert set(row["median_ms"]) == {"naclip", "sfp"}
    assert row["ratios"]["sfp"]["ratio"] > 0.5
