"""The kernel benchmark runs, checks what it times and writes its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require_cuda

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {
    "preprocess",
    "relationship_descriptor",
    "patch_text_similarity",
    "upsample_argmax",
    "overlay",
    "ink",
    "mask_boxes",
    "crop_regions",
    "label_regions",
    "all_finite",
    "count_labels",
    "warp_blend",
}


@pytest.fixture
def tool(monkeypatch):
    from zsseg_rt import ops

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark_kernels

    threads = ops.get_num_threads()
    yield benchmark_kernels
    ops.set_num_threads(threads)


def test_quick_run_writes_every_operation_with_machine_sizes_and_commit(tmp_path):
    file = tmp_path / "report.json"
    script = ROOT / "tools" / "benchmark_kernels.py"
    arguments = ["--quick", "--device", "cpu", "--threads", "2", "--json", str(file)]
    environment_path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    code = f"{environment_path}sys.argv = {[str(script), *arguments]!r}; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    assert {result["op"] for result in report["results"]} == OPERATIONS
    for result in report["results"]:
        assert result["sizes"]
        assert result["median_ms"]["zsseg_rt"] > 0
        assert result["cold_median_ms"]["zsseg_rt"] > 0
        assert f"{result['op']}  {result['sizes']}" in run.stdout
    assert report["machine"]["cpu"]
    assert report["commit"]
    assert report["threads"] == 2


def test_a_wrong_result_is_not_timed(tool, monkeypatch, capsys):
    right = tool.ops.upsample_argmax

    def wrong(*args, **kwargs):
        labels, scores = right(*args, **kwargs)
        labels[...] ^= 1
        return labels, scores

    monkeypatch.setattr(tool.ops, "upsample_argmax", wrong)
    assert tool.main(["--quick", "--device", "cpu", "--op", "upsample_argmax"]) == 1
    output = capsys.readouterr()
    assert "differ from the reference" in output.err
    assert output.out == ""


def test_a_missing_gpu_is_said(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool.ops, "cuda_device_count", lambda: 0)
    assert tool.main(["--quick", "--device", "cuda"]) == 4
    assert "expected a CUDA device, got none" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.needs_cuda
def test_a_quick_run_on_the_gpu(tool, tmp_path):
    require_cuda()
    file = tmp_path / "report.json"
    assert tool.main(["--quick", "--device", "cuda", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert {result["op"] for result in report["results"]} == OPERATIONS
    assert report["machine"]["gpu"]
