"""``benchmarks/engine.py --device cuda``: every case runs, and what cannot be told is said.

The graphs run on the host, torch on the CPU: any CUDA device will do, the emulated one included.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import require_cuda
from support.host_backend import host_backend
from zsseg_rt import ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    for package in ("cv2", "torch"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{n: importlib.import_module(n) for n in ("engine", "engine_cuda")})


@pytest.mark.nightly
@pytest.mark.needs_cuda
def test_every_case_is_measured(scripts, monkeypatch, tmp_path, capsys):
    require_cuda()
    placed = host_backend(monkeypatch, "own arrays") | {"use_cache": False}
    monkeypatch.setattr(scripts.engine_cuda, "SWAPS", 2)
    setting = scripts.engine_cuda.Setting(
        torch_device="cpu",
        engine=placed,
        precisions=("float32", "int8"),
        sizes_hw=((30, 40),),
        class_counts=(5, 300),
        rounds=1,
    )
    model, bundle = scripts.engine.build_model("tiny"), tmp_path / "tiny.zsseg"
    scripts.engine.export(model, bundle)
    kept = []
    run, copies = scripts.engine_cuda.run, lambda report: kept.append(json.dumps(report))
    report = run(bundle, setting, lambda: model, copies)
    assert [len(json.loads(each).get("cases", ())) for each in kept] == [0, 1, 2, 2]
    assert (list(report["opened"]), list(report["missing"])) == (["float32"], ["int8"])
    assert report["failed"] == {}
    assert json.loads(json.dumps(report))["machine"]["gpu"] == str(ops.cuda_device_properties(0))
    assert [case["classes"] for case in report["cases"]] == [5, 300]
    for case in report["cases"]:
        rows = case["candidates"]
        for name in ("engine", "torch"):
            row = rows[f"{name} float32, host to host"]
            assert 0 < row["p50_ms"] <= row["p99_ms"]
            assert row["launches"] == "missing: no GPU that torch sees"
        assert rows["engine float32, device to device"]["p50_ms"] > 0
        assert case["missing"] == {}
        assert case["agreement"]["float32"] > 0.99  # the same weights, the same rule
    assert set(report["set_classes_ms"]) == {"5", "300"}
    scripts.engine.print_report(report)
    printed = capsys.readouterr().out
    assert "40x30, 300 classes" in printed


def test_a_missing_gpu_is_said():
    if ops.cuda_device_count() > 0:
        pytest.skip("there is a GPU")
    pytest.importorskip("cv2")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "--device", "cuda"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 4
    assert "expected a CUDA device, got none" in done.stderr
