"""Tools, benchmarks, studies and hostile input: a help, a least run; which tests run and where."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require_cuda
from support.choice import ROOMS
from support.command_line import python
from support.host_backend import host_backend
from zsseg_rt import ops

ROOT = Path(__file__).resolve().parents[2]
HERE, BENCHMARKS = ROOT / "python_tests", ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# Runs at the end of the script, in its process and with its import path.
PROBE = """
import atexit, pathlib, sys
def probe():
    import cProfile, profile
    pathlib.Path({marker!r}).write_text(profile.__file__ + chr(10) + str(cProfile.Profile))
atexit.register(probe)
"""


@pytest.mark.parametrize("name", [*SCRIPTS, "-m tools.profile"])
def test_a_script_runs_as_a_file_and_as_a_module(name, tmp_path):
    """A probe in its process imports what tools/profile.py could shadow."""
    marker = tmp_path / "imported"
    (tmp_path / "sitecustomize.py").write_text(PROBE.format(marker=str(marker)))
    as_file = name in SCRIPTS
    call, folder = ([f"{name}.py"], ROOT / "tools") if as_file else (name.split(), ROOT)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python(*call, "--help", cwd=folder, more_env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    profile, cprofile = marker.read_text().splitlines()
    assert not Path(profile).is_relative_to(ROOT)
    assert "class" in cprofile


def shell(script, *arguments, folder):
    """Exit code and output of a script that must not start to work: nothing is on its PATH."""
    for name in ("bash", "sed", "dirname", "realpath"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name))
    paths = {"PATH": str(folder), "ZSSEG_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [folder / "bash", script, *arguments], cwd=folder, env=os.environ | paths,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


SHELL = sorted(path for path in (ROOT / "tools").rglob("*.sh") if path.name != "wheel_parts.sh")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_help_and_refuse_instead_of_starting_to_work(script, tmp_path):
    code, out, err = shell(script, "--help", folder=tmp_path)
    assert code == 0, err
    assert script.name in out or "usage" in out
    code, out, err = shell(script, "--bogus", folder=tmp_path)
    assert code == 2, out + err
    assert err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fats"],
        ["--fast", "--nightly"],
        ["--fast", "--cov"],
        ["-z"],
        ["-k"],
        ["no_such_file"],
        ["-n", "0", "-k", "swap or lane", "-xvs", "--durations=5"],
        ["python_tests/unit/test_budget.py::test_x", "--pdb", "--fast"],
        ["--nightly", "--", "--cov", "no_such_file.py"],
    ],
)
def test_the_test_command_passes_on_what_pytest_knows_and_refuses_the_rest(arguments, tmp_path):
    """It goes on to its first step, and ends there: no compiler is on the PATH."""
    code, out, err = shell(ROOT / "tools" / "test.sh", *arguments, folder=tmp_path)
    if len(arguments) < 3:
        assert code == 2, out
        assert err.startswith("test.sh: ")
    assert ("== system packages" in out) == (len(arguments) > 2), err


CONFTEST = "from support.choice import pytest_addoption, pytest_collection_modifyitems\n"
CASES = """
import pytest
@pytest.mark.nightly
def test_slow(): pass
@pytest.mark.needs_cuda
def test_gpu(): pass
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2, 3])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_grid(a, b, c): pass
"""


def test_nightly_tests_run_when_asked_for_or_named_and_fast_cuts_grids_of_operations(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("test_ops_some.py", "test_other.py"):
        (tmp_path / name).write_text(CASES)

    def collected(*arguments):
        call = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments)
        places = (f"--rootdir={tmp_path}", "-c", "/dev/null")
        done = python(*call, *places, cwd=tmp_path, env={"PYTHONPATH": str(HERE), "PATH": ""})
        assert done.returncode == 0, done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if "::" in line]

    ordinary = collected()
    assert len(ordinary) == 2 * 28
    assert not [name for name in ordinary if "test_slow" in name]
    assert len(collected("--nightly")) == 2 * 29
    assert collected("test_other.py::test_slow") == ["test_other.py::test_slow"]
    fast = collected("--fast")
    assert not [name for name in fast if "test_gpu" in name or "test_slow" in name]
    of_operation = [name for name in fast if name.startswith("test_ops_")]
    assert 9 <= len(of_operation) <= 12
    assert len(fast) - len(of_operation) == 27


NOT_IN_UNIT = re.compile(
    r"^\s*(?:import|from) (?:accelerate|fastapi|gi|httpx|multiprocessing|onnx|open_clip|playwright"
    r"|ray|socket|subprocess|torch|torchvision|uvicorn|websockets"
    r"|zsseg_rt\.(?:export|models|server|torch_files|training))\b",
    re.MULTILINE,
)


def test_each_file_stands_in_a_room_and_unit_tests_need_no_torch_and_no_process():
    files = [path for room in ROOMS for path in (HERE / room).glob("test_*.py")]
    assert sorted(files) == sorted(HERE.rglob("test_*.py"))
    assert len({path.name for path in files}) == len(files) > 60  # no name twice
    for path in (HERE / "unit").glob("test_*.py"):
        assert not NOT_IN_UNIT.search(path.read_text(encoding="utf-8")), path.name


# --- hostile input of every kind is accepted or refused; what does worse is found and named ---


def torture(*arguments, home, code=0):
    """Its report, and what it printed."""
    path = home / "report.json"
    done = python("-m", "tools.torture", "--json", path, *arguments, cwd=ROOT)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-1000:]
    return json.loads(path.read_text()), done.stdout


@pytest.mark.nightly
def test_torture_finds_crashes_hangs_memory_and_foreign_errors(tmp_path):
    limits = ("--cases", 10, "--seconds", 300, "--hangs-after", 1)
    report, printed = torture(*limits, "itself", home=tmp_path, code=1)
    failures = {entry["case"]: entry for entry in report["failures"]}
    kinds = {case: entry["kind"] for case, entry in failures.items()}
    assert kinds == {2: "crash", 4: "hang", 6: "untyped", 8: "memory"}
    assert failures[2]["message"] == "SIGSEGV"
    assert "itself.py" in failures[4]["trace"]  # where it hung
    assert report["targets"]["itself"] == {"accepted": 2, "refused": 5, "failed": 4}
    assert "itself 1 2: crash: SIGSEGV" in printed


@pytest.mark.parametrize("arguments", ["nothing", "--case 1", "--case 1 ops uris"])
def test_a_wrong_call_of_torture_is_refused(arguments, monkeypatch, capsys):
    from tools.torture.__main__ import main

    monkeypatch.setattr("sys.argv", ["torture", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error:" in capsys.readouterr().err


@pytest.mark.nightly
def test_no_case_of_any_target_fails(tmp_path):
    pytest.importorskip("torch")
    report, _ = torture("--seconds", 500, "--cases", 10, home=tmp_path)
    assert report["untried"] == []


def test_operations_are_tried_in_every_run(tmp_path):
    """Beside each other target a short run hardly comes to them, and one that fails goes unseen."""
    names = ["ops", "overlaps"]
    if os.environ.get("ZSSEG_EMULATED_EXTENSION"):
        names += ["ops-cuda", "overlaps-cuda"]
    report, _ = torture("--seconds", 60, "--cases", 150, *names, home=tmp_path)
    for name in set(names) - set(report["untried"]):
        counts = report["targets"][name]
        assert min(counts["accepted"], counts["refused"]) > 0, name
    assert not {"ops", "overlaps"} & set(report["untried"])


# --- benchmarks and studies; documents hold what their reports say ---


def run(script, *arguments, home):
    parts = Path(script).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__main__")
    paths, report = os.pathsep.join([str(ROOT), str(BENCHMARKS)]), home / "report.json"
    written = () if "--help" in arguments else ("--json", report)
    places = {"PYTHONPATH": paths, "ZSSEG_HOME": str(home / "home")}
    call = ("-m", module, *arguments, *written)
    done = python(*call, cwd=ROOT, timeout=900, more_env=places)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()) if report.exists() else {}, done.stdout


def has_main(path):
    text = path.read_text(encoding="utf-8")
    return "ArgumentParser" in text and "__main__" in text and path.parent.name != "rivals"


@pytest.mark.nightly
def test_benchmarks_and_studies_have_a_help(tmp_path):
    for folder in (BENCHMARKS, ROOT / "tools" / "studies"):
        for script in filter(has_main, folder.rglob("*.py")):
            assert "usage" in run(script.relative_to(ROOT), "--help", home=tmp_path)[1], script


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


def test_what_benchmarks_take_from_the_tests_is_there():
    pytest.importorskip("torch")
    taken = re.compile(r"^ *from (support[.\w]*) import ([\w, ]+)", re.MULTILINE)
    texts = [file.read_text() for file in (ROOT / "benchmarks").rglob("*.py")]
    pairs = {pair for text in texts for pair in taken.findall(text)}
    assert len(pairs) >= 3
    for module, names in pairs:
        exec(f"from {module} import {names}", {})


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool, threads = importlib.import_module("benchmark_kernels"), ops.get_num_threads()
    right = tool.ops.upsample_argmax

    def wrong(*args, **kwargs):
        labels, scores = right(*args, **kwargs)
        return labels ^ 1, scores

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
    report = engine.run(bundle, setting, lambda: model, json.dumps)
    assert (list(report["opened"]), list(report["missing"])) == (["float32"], ["int8"])
    assert (report["failed"], [case["classes"] for case in report["cases"]]) == ({}, [5, 300])
    for case in report["cases"]:
        assert case["candidates"]["engine float32, device to device"]["p50_ms"] > 0
        assert case["agreement"]["float32"] > 0.99  # the same weights, the same rule
    engine.print_report(report)
    assert "40x30, 300 classes" in capsys.readouterr().out


def test_pages_hold_what_the_reports_say_that_they_name():
    """If this fails, run ``python benchmarks/run.py --tables`` with the report that it names."""
    import models_table
    from rivals.report import read_report
    from rivals.tables import PAGE, filled, source_of

    text = PAGE.read_text(encoding="utf-8")
    source = source_of(text)
    assert filled(text, read_report(source), source) == text
    page = models_table.PAGE.read_text(encoding="utf-8")
    names = re.search(r"^<!-- models table: (.*) -->$", page, re.MULTILINE)[1].split()
    results = [BENCHMARKS / "results" / name for name in names]
    assert models_table.with_table(page, results) == page
