"""Which tests run and where, and scripts in tools/, which shadow no module of Python's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.choice import ROOMS
from support.command_line import python

ROOT = Path(__file__).resolve().parents[2]
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


SHELL = sorted(path for path in (ROOT / "tools").rglob("*.sh") if path.name != "wheel_parts.sh")


def shell(script, *arguments, folder):
    """Exit code and output of a script that must not start to work: nothing is on its PATH."""
    tools = folder / "tools_of_the_system"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "sed", "dirname", "realpath"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    environment = {**os.environ, "PATH": str(tools), "ZSSEG_PYTHON": sys.executable}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [shutil.which("bash"), script, *arguments], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_help_and_refuse_instead_of_starting_to_work(script, tmp_path):
    code, out, err = shell(script, "--help", folder=tmp_path)
    assert code == 0, err
    assert script.name in out or "usage" in out
    code, out, err = shell(script, "--bogus", folder=tmp_path)
    assert code == 2, out + err
    assert err


@pytest.mark.parametrize(
    "arguments", ["--fats", "--fast --nightly", "--fast --cov", "-z", "-k", "no_such_file"]
)
def test_the_test_command_refuses_what_it_does_not_know(arguments, tmp_path):
    code, out, err = shell(ROOT / "tools" / "test.sh", *arguments.split(), folder=tmp_path)
    assert code == 2, out
    assert err.startswith("test.sh: ")
    assert "== " not in out  # nothing was begun


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "0", "-k", "swap or lane", "-xvs", "--durations=5"],
        ["python_tests/unit/test_files.py::test_x", "--pdb", "--fast"],
        ["--nightly", "--", "--cov", "no_such_file.py"],
    ],
)
def test_the_test_command_passes_on_what_pytest_knows(arguments, tmp_path):
    """It goes on to its first step, and ends there: no compiler is on the PATH."""
    _, out, err = shell(ROOT / "tools" / "test.sh", *arguments, folder=tmp_path)
    assert "== system packages" in out, err


HERE = Path(__file__).parents[1]
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


def collected(folder, *arguments):
    (folder / "conftest.py").write_text(CONFTEST)
    for name in ("test_ops_some.py", "test_other.py"):
        (folder / name).write_text(CASES)
    call = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    call += [*arguments, f"--rootdir={folder}", "-c", "/dev/null"]
    done = subprocess.run(
        call, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(HERE), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_nightly_tests_run_when_asked_for_or_named(tmp_path):
    ordinary = collected(tmp_path)
    assert len(ordinary) == 2 * 28
    assert not [name for name in ordinary if "test_slow" in name]
    assert len(collected(tmp_path, "--nightly")) == 2 * 29
    assert collected(tmp_path, "test_other.py::test_slow") == ["test_other.py::test_slow"]


def test_fast_cuts_grids_of_operations_and_leaves_out_cuda(tmp_path):
    fast = collected(tmp_path, "--fast")
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
