"""The doctor reports whatever the environment says: its reader has just that to mend."""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest

from support.command_line import python
from support.gstreamer import require_gstreamer
from zsseg_rt.doctor import examine


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
    run = python("-c", code, cwd=Path(__file__).parents[1])
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
    run = python("-m", "zsseg_rt", "doctor", "--json", report, more_env=wrong)
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
