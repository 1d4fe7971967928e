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


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with packages whose import fails; OpenCV's says something else from then on."""
    folder = tmp_path_factory.mktemp("broken")
    for package, (reason, _) in BROKEN.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(
            "import sys\n"
            f"again, sys.tried_{package} = hasattr(sys, 'tried_{package}'), True\n"
            f"raise ImportError('recursion is detected' if again else {reason!r})\n"
        )
    return folder


def run(folder, *packages, arguments, cwd):
    own = cwd / "packages"
    own.mkdir(exist_ok=True)
    for package in packages:
        (own / package).symlink_to(folder / package)
    path = os.pathsep.join([str(own), *filter(None, [os.environ.get("PYTHONPATH")])])
    return python_child("-m", "zsseg_rt", *arguments, more_env={"PYTHONPATH": path}, cwd=cwd)


@pytest.mark.parametrize("package", USED)
def test_the_import_s_own_reason_is_told_with_its_cure(package, broken, tmp_path):
    reason, cure = BROKEN[package]
    (tmp_path / "VIDEO").write_bytes(bytes(99))
    done = run(broken, package, arguments=USED[package], cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert reason in line
    assert cure in line
    assert "got nothing" not in line


def test_the_doctor_tells_all_of_them(broken, tmp_path):
    done = run(broken, "cv2", "openvino", "av", "gi", arguments=["doctor", "--json", "r.json"],
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 4, done.stderr
    findings = json.loads((tmp_path / "r.json").read_text())["findings"]
    by_topic = {line["topic"]: line for line in findings}
    topics = {"cv2": "OpenCV", "openvino": "OpenVINO", "av": "PyAV", "gi": "GStreamer"}
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
    (root / "setup.py").write_text("")
    return root


@pytest.fixture
def site(tmp_path):
    """Site-packages after ``pip install .``, as far as the core is concerned."""
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

    def run_in(site, *arguments):
        path = os.pathsep.join(map(str, (site, packages)))
        places = {"PYTHONPATH": path, "ZSSEG_HOME": str(checkout / "cache")}
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
        write_version(site, "0.0.9")
    else:
        with (site / "zsseg_rt" / "_C.pyi").open("a") as stub:
            stub.write("def gone() -> None: ...\n")
    done = python(site, "-c", USE_CORE)
    assert done.returncode == 1
    assert "got only another one" in done.stderr
    assert "pip install -e" in done.stderr
