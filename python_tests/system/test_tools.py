"""Scripts in tools/ run as file and module, shadow no module of Python's, and help when asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def run(tmp_path):
    """Runs Python with a probe that imports what tools/profile.py could shadow."""
    marker = tmp_path / "imported"
    (tmp_path / "sitecustomize.py").write_text(PROBE.format(marker=str(marker)))

    def run_python(*arguments, cwd):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        call = [sys.executable, *arguments, "--help"]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            call, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
        found, cprofile = marker.read_text().splitlines()
        assert not Path(found).is_relative_to(ROOT)
        assert "class" in cprofile

    return run_python


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_a_file_and_as_a_module(run, name):
    run(f"{name}.py", cwd=ROOT / "tools")
    if name == "profile":
        run("-m", f"tools.{name}", cwd=ROOT)


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
    "arguments",
    [["--fats"], ["--fast", "--nightly"], ["--fast", "--cov"], ["-z"], ["-k"], ["no_such_file"]],
    ids=" ".join,
)
def test_the_test_command_refuses_what_it_does_not_know(arguments, tmp_path):
    code, out, err = shell(ROOT / "tools" / "test.sh", *arguments, folder=tmp_path)
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
    ids=" ".join,
)
def test_the_test_command_passes_on_what_pytest_knows(arguments, tmp_path):
    """It goes on to its first step, and ends there: no compiler is on the PATH."""
    _, out, err = shell(ROOT / "tools" / "test.sh", *arguments, folder=tmp_path)
    assert "== system packages" in out, err
