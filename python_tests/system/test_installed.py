"""Packages that cannot be imported, and Python that starts in a checkout without a core."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest

import zsseg_rt
from support.command_line import python as python_child
from zsseg_rt import _C

LIBGL = "libGL.so.1: cannot open shared object file: No such file or directory"
GLIBCXX = "/usr/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by core.so)"
LIBVPX = "libvpx.so.9: cannot open shared object file: No such file or directory"
HALF = "cannot import name '_gi' from partially initialized module 'gi'"
BROKEN = {
    "cv2": (LIBGL, "sudo apt install libgl1"),
    "openvino": (GLIBCXX, "sudo apt install libstdc++6"),
    "av": (LIBVPX, "apt-file search libvpx.so.9"),
    "gi": (HALF, "pip install --force-reinstall PyGObject"),
    "fastapi": (GLIBCXX, "libstdc++6"),
}
USED = {
    "cv2": ["segment", "--demo", "scenes"],
    "av": ["stream", "VIDEO", "overlay.mp4", "-b", "demo", "--classes", "cat"],
    "fastapi": ["serve", "--demo"],
}


@pytest.fixture
def run(tmp_path):
    """Runs the program beside packages whose import fails; OpenCV's then says something else."""

    def run_with(*packages, arguments):
        for package in packages:
            (tmp_path / "packages" / package).mkdir(parents=True)
            (tmp_path / "packages" / package / "__init__.py").write_text(
                "import sys\n"
                f"again, sys.tried_{package} = hasattr(sys, 'tried_{package}'), True\n"
                f"raise ImportError('recursion is detected' if again else {BROKEN[package][0]!r})\n"
            )
        path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path.rstrip(os.pathsep)}
        return python_child("-m", "zsseg_rt", *arguments, more_env=own, cwd=tmp_path)

    return run_with


@pytest.mark.parametrize("package", USED)
def test_the_import_s_own_reason_is_told_with_its_cure(package, run, tmp_path):
    (tmp_path / "VIDEO").write_bytes(bytes(99))
    done = run(package, arguments=USED[package])
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.strip().splitlines()
    for part in BROKEN[package]:
        assert part in line
    assert "got nothing" not in line


def test_the_doctor_tells_all_of_them(run, tmp_path):
    topics = {"cv2": "OpenCV", "openvino": "OpenVINO", "av": "PyAV", "gi": "GStreamer"}
    done = run(*topics, arguments=["doctor", "--json", "r.json"])
    assert done.returncode == 4, done.stderr
    findings = json.loads((tmp_path / "r.json").read_text())["findings"]
    by_topic = {line["topic"]: line for line in findings}
    for package, topic in topics.items():
        reason, cure = BROKEN[package]
        assert reason in by_topic[topic]["detail"]
        assert cure in by_topic[topic]["remedy"]


NAMELESS = """
import os, pwd, sys
pwd.getpwuid = {}.__getitem__  # a KeyError for everybody
os.environ.pop("HOME", None)
from zsseg_rt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_user_without_name_and_home_is_served(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "ZSSEG_HOME")}
    call = ("-c", NAMELESS, "segment", "--demo", "scenes", "-o", "out")
    done = python_child(*call, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert not (tmp_path / "~").exists()


PACKAGE = Path(zsseg_rt.__file__).parent
CORE = Path(_C.__file__)
USE_CORE = "from zsseg_rt import ops; print(ops.cpu_isa(), ops.__file__)"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with every installed package but ours, which may be installed editable."""
    folder = tmp_path_factory.mktemp("packages")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
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
    (root / "setup.py").touch()
    return root


@pytest.fixture
def site(tmp_path):
    """Site-packages after ``pip install .``, as far as the core is concerned."""
    folder = tmp_path / "site"
    (folder / "zsseg_rt").mkdir(parents=True)
    (folder / "zsseg_rt" / CORE.name).symlink_to(CORE)
    shutil.copy(PACKAGE / "_C.pyi", folder / "zsseg_rt")
    (folder / "zsseg_rt.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: zsseg_rt\nVersion: {zsseg_rt.__version__}\n"
    (folder / "zsseg_rt.dist-info" / "METADATA").write_text(metadata)
    return folder


@pytest.fixture
def python(checkout, packages):
    """Runs Python in the checkout, with an installation behind it on the path."""

    def run_in(site, *arguments):
        places = {"PYTHONPATH": f"{site}:{packages}", "ZSSEG_HOME": str(checkout / "cache")}
        return python_child("-S", *arguments, cwd=checkout, more_env=places)

    return run_in


def test_the_installed_core_serves_the_checkout_and_is_named(python, checkout, site):
    done = python(site, "-c", USE_CORE)
    assert done.returncode == 0, done.stderr
    assert str(checkout) in done.stdout  # the checkout's own Python
    assert f"using the installed one, {site}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_an_installation_the_error_says_what_to_run(python, checkout, tmp_path):
    done = python(tmp_path / "nowhere", "-m", "zsseg_rt", "segment", "--demo")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert f"expected the compiled core _C in {checkout / 'zsseg_rt'}, got nothing" in line
    assert f"pip install -e {checkout}" in line
    report = tmp_path / "report.json"
    done = python(tmp_path / "nowhere", "-m", "zsseg_rt", "doctor", "--json", report)
    assert done.returncode == 4
    assert "pip install -e" in report.read_text()


@pytest.mark.parametrize("changed", ["version", "interface"])
def test_a_core_that_does_not_fit_is_refused(python, site, changed):
    if changed == "version":
        metadata = site / "zsseg_rt.dist-info" / "METADATA"
        metadata.write_text(metadata.read_text().replace(zsseg_rt.__version__, "0.0.9"))
    else:
        with (site / "zsseg_rt" / "_C.pyi").open("a") as stub:
            stub.write("def gone() -> None: ...\n")
    done = python(site, "-c", USE_CORE)
    assert done.returncode == 1
    assert "got only another one" in done.stderr
    assert "pip install -e" in done.stderr
