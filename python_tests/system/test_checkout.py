"""Python that starts in a checkout, which hides the installed package, finds the compiled core."""

import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest

import zsseg_rt
from zsseg_rt import _C

PACKAGE = Path(zsseg_rt.__file__).parent
CORE = Path(_C.__file__)
USE_CORE = "from zsseg_rt import ops; print(ops.cpu_isa(), ops.__file__)"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with every installed package but ours, which may be installed editable."""
    folder = tmp_path_factory.mktemp("packages")
    for found in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(found).iterdir():
            if "zsseg_rt" not in entry.name and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout after ``pip install .``: the source, and nothing compiled."""
    root = tmp_path / "checkout"
    skipped = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(PACKAGE, root / "zsseg_rt", ignore=skipped)
    (root / "csrc").mkdir()
    (root / "setup.py").write_text("")
    return root


@pytest.fixture
def site(tmp_path):
    """What ``pip install .`` leaves in site-packages, as far as the core is concerned."""
    folder = tmp_path / "site"
    (folder / "zsseg_rt").mkdir(parents=True)
    (folder / "zsseg_rt" / CORE.name).symlink_to(CORE)
    shutil.copy(PACKAGE / "_C.pyi", folder / "zsseg_rt")
    write_version(folder, zsseg_rt.__version__)
    return folder


def write_version(site, version):
    information = site / "zsseg_rt.dist-info"
    information.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: zsseg_rt\nVersion: {version}\n"
    (information / "METADATA").write_text(metadata)


@pytest.fixture
def python(checkout, packages):
    """Runs Python in the checkout, with an installation behind it on the path."""
    return partial(run, checkout, packages)


def run(checkout, packages, site, *arguments):
    path = os.pathsep.join(map(str, (site, packages)))
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path, "ZSSEG_HOME": str(checkout / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_installed_core_serves_the_checkout_and_is_named(python, checkout, site):
    done = python(site, "-c", USE_CORE)
    assert done.returncode == 0, done.stderr
    assert str(checkout) in done.stdout  # the checkout's own Python
    assert f"using the installed one, {site}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_an_installation_the_error_is_one_line_and_says_what_to_run(
    python, checkout, tmp_path
):
    done = python(tmp_path / "nowhere", "-m", "zsseg_rt", "segment", "--demo")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert f"expected the compiled core _C in {checkout / 'zsseg_rt'}, got nothing" in line
    assert f"pip install -e {checkout}" in line
    assert "start Python in another folder" in line


@pytest.mark.parametrize("changed", ["version", "interface"])
def test_a_core_that_does_not_fit_is_refused(python, site, changed):
    if changed == "version":
        write_version(site, "0.0.9")
    else:
        with (site / "zsseg_rt" / "_C.pyi").open("a") as stub:
            stub.write("def gone() -> None: ...\n")
    done = python(site, "-c", USE_CORE)
    assert done.returncode == 1
    assert "got only another one" in done.stderr
    assert "pip install -e" in done.stderr


def test_the_doctor_says_what_helps_in_a_checkout(python, tmp_path):
    report = tmp_path / "report.json"
    done = python(tmp_path / "nowhere", "-m", "zsseg_rt", "doctor", "--json", report)
    assert done.returncode == 4
    assert "pip install -e" in report.read_text()
