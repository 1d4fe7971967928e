"""Benchmarks and studies have a help and a least run; documents hold what their reports say."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

from conftest import require_cuda
from support.command_line import python
from support.host_backend import host_backend
from zsseg_rt import ops

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def has_main(path):
    text = path.read_text(encoding="utf-8")
    return "ArgumentParser" in text and "__main__" in text


SCRIPTS = [
    path.relative_to(ROOT)
    for folder in (BENCHMARKS, ROOT / "tools" / "studies")
    for path in sorted(folder.rglob("*.py"))
    if has_main(path) and path.parent.name != "rivals"
]


def run(script, *arguments, home):
    parts = Path(script).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__main__")
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    report = home / "report.json"
    written = () if "--help" in arguments else ("--json", report)
    places = {"PYTHONPATH": paths, "ZSSEG_HOME": str(home / "home")}
    call = ("-m", module, *arguments, *written)
    done = python(*call, cwd=ROOT, timeout=900, more_env=places)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()) if report.exists() else {}, done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_has_a_help(script, tmp_path):
    assert "usage" in run(script, "--help", home=tmp_path)[1]


LEAST = {  # arguments, and a key of the report
    "benchmarks/follow.py": ("--quick", "drawn, 2"),
    "benchmarks/photo_folder.py": ("--photos 4 --size 160x120 --rounds 1", "photos per second"),
    "benchmarks/precision.py": ("--quick --only clip_rc scenes --threads 1", "rows"),
    "benchmarks/run.py": ("--quick", "cases"),
    "benchmarks/sampler.py": ("--comparisons 1 --max-rounds 10", "slow"),
    "benchmarks/small_encoders.py": ("--quick", "frames"),
    "benchmarks/steady.py": ("--quick", "steady"),
    "tools/benchmark_kernels.py": ("--quick --device cpu --threads 2", "results"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("script", LEAST)
def test_a_least_run_reports(script, tmp_path):
    arguments, key = LEAST[script]
    report, printed = run(script, *arguments.split(), home=tmp_path)
    assert report[key]
    assert printed
    if script == "tools/benchmark_kernels.py":
        assert len({result["op"] for result in report[key]}) == 12
        assert not any("failed" in result for result in report[key])


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool, threads = importlib.import_module("benchmark_kernels"), ops.get_num_threads()
    right = tool.ops.upsample_argmax

    def wrong(*args, **kwargs):
        labels, scores = right(*args, **kwargs)
        labels[...] ^= 1
        return labels, scores

    monkeypatch.setattr(tool.ops, "upsample_argmax", wrong)
    assert tool.main(["--quick", "--device", "cpu", "--op", "upsample_argmax"]) == 1
    ops.set_num_threads(threads)
    output = capsys.readouterr()
    assert "differ from the reference" in output.err
    assert output.out == ""


def test_a_missing_gpu_is_said():
    if ops.cuda_device_count() > 0:
        pytest.skip("there is a GPU")
    done = python("benchmarks/engine.py", cwd=ROOT)
    assert done.returncode == 4
    assert "expected a CUDA device, got none" in done.stderr


@pytest.mark.nightly
@pytest.mark.needs_cuda
def test_the_engine_on_a_gpu_is_measured(monkeypatch, tmp_path, capsys):
    """Its graphs run on the host, torch on the CPU: any CUDA device will do."""
    require_cuda()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    engine = importlib.import_module("engine")
    placed = host_backend(monkeypatch, "own arrays") | {"use_cache": False}
    monkeypatch.setattr(engine, "SWAPS", 2)
    setting = engine.Setting(
        torch_device="cpu", engine=placed, precisions=("float32", "int8"), sizes_hw=((30, 40),),
        class_counts=(5, 300), rounds=1,
    )  # fmt: skip
    model, bundle = engine.build_model("tiny"), tmp_path / "tiny.zsseg"
    engine.export(model, bundle)
    report = engine.run(bundle, setting, lambda: model, lambda report: json.dumps(report))
    assert (list(report["opened"]), list(report["missing"])) == (["float32"], ["int8"])
    assert (report["failed"], [case["classes"] for case in report["cases"]]) == ({}, [5, 300])
    for case in report["cases"]:
        assert case["candidates"]["engine float32, device to device"]["p50_ms"] > 0
        assert case["agreement"]["float32"] > 0.99  # the same weights, the same rule
    engine.print_report(report)
    assert "40x30, 300 classes" in capsys.readouterr().out


def test_the_page_of_benchmarks_holds_what_its_reports_say(monkeypatch):
    """If this fails, run ``python benchmarks/run.py --tables`` with the report that it names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rivals.report import read_report
    from rivals.tables import PAGE, filled, source_of

    text = PAGE.read_text(encoding="utf-8")
    source = source_of(text)
    assert filled(text, read_report(source), source) == text


def test_the_page_of_models_has_the_table_of_the_reports_that_it_names():
    import models_table

    page = models_table.PAGE.read_text(encoding="utf-8")
    names = re.search(r"^<!-- models table: (.*) -->$", page, re.MULTILINE)[1].split()
    results = [ROOT / "benchmarks" / "results" / name for name in names]
    assert models_table.with_table(page, results) == page
