"""Packages that are installed and cannot be imported: the import's own reason, and its cure."""

import json
import os
import subprocess
import sys

import pytest

LIBGL = "libGL.so.1: cannot open shared object file: No such file or directory"
GLIBCXX = "/usr/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by core.so)"
LIBVPX = "libvpx.so.9: cannot open shared object file: No such file or directory"
HALF = "cannot import name '_gi' from partially initialized module 'gi'"
BROKEN = {
    "cv2": (LIBGL, "sudo apt install libgl1"),
    "openvino": (GLIBCXX, "sudo apt install libstdc++6"),
    "av": (LIBVPX, "apt-file search libvpx.so.9"),
    "PIL": (LIBGL, "sudo apt install libgl1"),
    "gi": (HALF, "pip install --force-reinstall PyGObject"),
    "fastapi": (GLIBCXX, "libstdc++6"),
}
USED = {
    "cv2": ["segment", "--demo"],
    "openvino": ["segment", "--demo"],
    "av": ["stream", "VIDEO", "overlay.mp4", "-b", "demo", "--classes", "cat"],
    "PIL": ["evaluate", "demo", "--dataset", "folder", "--root", ".", "--split", "all"],
    "gi": ["stream", "gst:videotestsrc", "overlay.mp4", "-b", "demo", "--classes", "cat"],
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
    return subprocess.run(
        [sys.executable, "-m", "zsseg_rt", *arguments],
        env={**os.environ, "PYTHONPATH": path}, cwd=cwd,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("package", USED)
def test_the_import_s_own_reason_is_told_with_its_cure(package, broken, tmp_path):
    reason, cure = BROKEN[package]
    (tmp_path / "VIDEO").write_bytes(bytes(99))
    (tmp_path / "classes.txt").write_text("cat\n")
    for folder, name in (("images", "a.jpg"), ("masks", "a.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
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
    told = {found["topic"]: found for found in findings}
    topics = {"cv2": "OpenCV", "openvino": "OpenVINO", "av": "PyAV", "gi": "GStreamer"}
    for package, topic in topics.items():
        reason, cure = BROKEN[package]
        assert reason in told[topic]["detail"]
        assert cure in told[topic]["remedy"]


NAMELESS = """
import os, pwd, sys

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody
os.environ.pop("HOME", None)
from zsseg_rt.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("with_cache", [False, True])
def test_a_user_without_name_and_home_is_served(with_cache, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "ZSSEG_HOME")}
    if with_cache:
        environment["ZSSEG_HOME"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", NAMELESS, "segment", "--demo", "-o", "out"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "cache").is_dir() == with_cache
