"""Packages that cannot be imported, a checkout without a core, and what the doctor says of it."""

import importlib.metadata
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

import zsseg_rt
from support.command_line import python as python_child
from support.gstreamer import require_gstreamer
from zsseg_rt import _C
from zsseg_rt.doctor import examine

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


def finding(topic):
    return next(line for line in examine() if line.topic == topic)


@pytest.mark.parametrize("name", ["DEVICE", "BACKEND", "TENSORRT", "RTSP_LIBRARY"])
def test_a_wrong_variable_is_a_finding(monkeypatch, name):
    other = "RTSP_LIBRARY" if name == "TENSORRT" else "TENSORRT"
    for wrong in (name, other):  # all are named at once
        monkeypatch.setenv(f"ZSSEG_{wrong}", "abacus")
    line = finding("environment")
    assert line.status == "bad"
    assert f"ZSSEG_{name}: expected" in line.detail
    assert line.detail.count("'abacus'") == 2
    assert line.remedy
    monkeypatch.setenv("ZSSEG_DEVICE", "cpu")
    for unset in ("BACKEND", "TENSORRT", "RTSP_LIBRARY"):  # empty ones count as unset
        monkeypatch.setenv(f"ZSSEG_{unset}", "")
    line = finding("environment")
    assert (line.status, line.detail) == ("ok", "ZSSEG_DEVICE=cpu")


def test_packages_for_streams_are_told(monkeypatch):
    pytest.importorskip("av")
    assert finding("PyAV").status == "ok"
    assert "libx264 yes" in finding("PyAV").detail
    monkeypatch.setitem(sys.modules, "av", None)
    assert finding("PyAV").status == "bad"

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert finding("PyAV").status == "absent"
    assert "pip install '.[stream]'" in finding("PyAV").remedy


def gstreamer_in_a_child(tmp_path, before="", *, is_jetson=False):
    """The doctor's line on GStreamer, after some code."""
    release = tmp_path / "nv_tegra_release"
    if is_jetson:
        release.write_text("# R36 (release), REVISION: 4.3\n")
    code = f"""
{before}
import json, pathlib
from zsseg_rt import doctor
doctor._TEGRA_RELEASE = pathlib.Path({str(release)!r})
found = doctor._gstreamer()
print(json.dumps([found.status, found.detail, found.remedy]))
"""
    run = python_child("-c", code, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_gstreamer_is_told_and_what_it_lacks_with_its_package(tmp_path):
    require_gstreamer()
    status, detail, remedy = gstreamer_in_a_child(tmp_path)
    assert (status, remedy) == ("ok", "")
    assert "H.264 is decoded by avdec_h264; encoded by x264enc" in detail
    lacking = (
        "import gi; gi.require_version('Gst', '1.0')\n"
        "from gi.repository import Gst; Gst.init(None)\n"
        "for name in ('x264enc', 'rtspsrc'):\n"
        "    Gst.Registry.get().remove_feature(Gst.ElementFactory.find(name))\n"
    )
    status, detail, remedy = gstreamer_in_a_child(tmp_path, lacking)
    assert status == "absent"
    assert "missing: rtspsrc, x264enc" in detail
    assert "sudo apt install gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly" in remedy


def test_without_pygobject_gstreamer_is_absent(tmp_path):
    without = "import sys; sys.modules['gi'] = None"
    status, detail, remedy = gstreamer_in_a_child(tmp_path, without)
    assert status == "absent"
    assert "expected PyGObject" in detail
    assert "sudo apt install python3-gi" in remedy
    assert "pip install '.[gstreamer]'" in remedy


def test_a_jetson_s_elements_are_looked_for(tmp_path):
    require_gstreamer()
    status, detail, remedy = gstreamer_in_a_child(tmp_path, is_jetson=True)
    assert status == "absent"
    assert "missing: nvarguscamerasrc, nvvidconv, nvv4l2decoder, nvv4l2h264enc" in detail
    assert "sudo apt install nvidia-l4t-gstreamer" in remedy
    elements = ("nvarguscamerasrc", "nvvidconv", "nvv4l2decoder", "nvv4l2h264enc")
    stand_ins = f"from support.jetson_elements import register; register(*{elements})"
    status, detail, remedy = gstreamer_in_a_child(tmp_path, stand_ins, is_jetson=True)
    assert (status, remedy) == ("ok", "")
    assert "H.264 is decoded by nvv4l2decoder; encoded by x264enc" in detail
    assert "no /dev/v4l2-nvenc: this Jetson has no encoder" in detail


def test_a_wrong_instruction_set_leaves_the_rest_of_the_report(tmp_path):
    report = tmp_path / "report.json"
    wrong = {"ZSSEG_CPU_ISA": "abacus"}  # it is read once in a process
    run = python_child("-m", "zsseg_rt", "doctor", "--json", report, more_env=wrong)
    assert run.returncode == 4, run.stderr
    assert "ZSSEG_CPU_ISA" in run.stdout
    findings = {line["topic"]: line for line in json.loads(report.read_text())["findings"]}
    core = findings["native core"]
    assert core["status"] == "bad"
    assert "got 'abacus'" in core["detail"]
    assert "Unset ZSSEG_CPU_ISA" in core["remedy"]
    assert {"python", "CUDA", "OpenVINO", "OpenCV", "cameras", "cache"} <= findings.keys()


@pytest.mark.parametrize(("home", "below", "status"), [
    ("file", b"", "bad"), ("file", b"/x", "bad"), ("file", b"/x\xff", "bad"),
    ("loop", b"", "bad"), ("dangling", b"", "bad"), ("absent", b"x" * 300, "bad"),
    ("absent", b"\xff", "ok"),
])  # fmt: skip
def test_any_cache_folder_gets_a_line(tmp_path, monkeypatch, home, below, status):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("ZSSEG_HOME", os.fsdecode(os.fsencode(tmp_path / home) + below))
    line = finding("cache")
    assert line.status == status
    assert line.detail.encode()
    assert status == "ok" or "Set ZSSEG_HOME" in line.remedy
