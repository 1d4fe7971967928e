"""Every script in tools/ runs as a file and as a module, and shadows none of Python's modules."""

import os
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


def test_the_scripts_are_found():
    assert {"profile", "benchmark_kernels"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_a_file(run, name):
    run(str(ROOT / "tools" / f"{name}.py"), cwd=ROOT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_a_module(run, name):
    run("-m", f"tools.{name}", cwd=ROOT)


def test_a_script_runs_from_its_own_folder(run):
    run("profile.py", cwd=ROOT / "tools")
    run("benchmark_kernels.py", cwd=ROOT / "tools")


@pytest.mark.parametrize(
    "script", sorted((ROOT / "tools").glob("*.sh")), ids=lambda path: path.name
)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
