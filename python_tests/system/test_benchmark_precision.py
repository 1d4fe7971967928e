"""The short form of the ladder of precisions: every figure is there, and its tables can be made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zsseg_rt.backends import _openvino_core

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"

needs_vnni = pytest.mark.skipif(
    not _openvino_core.has_vnni(), reason="needs a CPU with VNNI, AMX or ARM's dot product"
)


@needs_vnni
def test_the_short_form_measures_every_precision(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--quick", "--only", "clip_rc", "scenes"]
    command += ["--threads", "1", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    random, scenes = json.loads(report.read_text())["rows"]
    assert random["side"] == 64
    assert scenes["layers"] == {"int8": [47, 47], "fp8": [47, 47]}
    for row in (random, scenes):
        assert {"float32", "int8"} <= set(row["ms"]) == set(row["same"])
        assert row["same"]["float32"] == 1.0
    assert scenes["gate"]["int8"] >= 0.98
    for group in ("miou", "seen", "unseen"):
        assert abs(scenes[group]["int8"] - scenes[group]["float32"]) < 2.0
    again = subprocess.run(
        [sys.executable, SCRIPT, "--markdown", report], capture_output=True, text=True, check=True
    )
    assert again.stdout == done.stdout
    assert again.stdout.count("the scenes demo's ZegCLIP") == 4
