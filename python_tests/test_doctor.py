"""The doctor reports whatever the environment says: its reader has just that to mend."""

import json
import os
import subprocess
import sys

import pytest

from zsseg_rt import _C
from zsseg_rt.backends import registry
from zsseg_rt.doctor import examine


def finding(topic):
    return next(found for found in examine() if found.topic == topic)


@pytest.mark.parametrize("variable", ["ZSSEG_DEVICE", "ZSSEG_BACKEND", "ZSSEG_TENSORRT"])
def test_a_wrong_variable_is_a_finding(monkeypatch, variable):
    monkeypatch.setenv(variable, "abacus")
    found = finding("environment")
    assert found.status == "bad"
    assert f"{variable}: expected" in found.detail
    assert "'abacus'" in found.detail
    assert found.remedy


def test_all_wrong_variables_are_named_at_once(monkeypatch):
    for variable in ("ZSSEG_DEVICE", "ZSSEG_TENSORRT"):
        monkeypatch.setenv(variable, "abacus")
    assert finding("environment").detail.count("'abacus'") == 2


def test_packages_for_streams_are_told(monkeypatch):
    pytest.importorskip("av")
    assert finding("PyAV").status == "ok"
    assert "libx264 yes" in finding("PyAV").detail
    assert "not used yet" in finding("GStreamer").remedy
    monkeypatch.setitem(sys.modules, "av", None)
    assert finding("PyAV").status == "bad"
    monkeypatch.setattr("zsseg_rt.doctor._version", lambda name: None)
    assert finding("PyAV").status == "absent"
    assert "pip install '.[stream]'" in finding("PyAV").remedy


def test_variables_that_are_set_are_shown_and_empty_ones_count_as_unset(monkeypatch):
    monkeypatch.setenv("ZSSEG_DEVICE", "cpu")
    monkeypatch.setenv("ZSSEG_BACKEND", "")
    monkeypatch.delenv("ZSSEG_TENSORRT", raising=False)
    found = finding("environment")
    assert (found.status, found.detail) == ("ok", "ZSSEG_DEVICE=cpu")


def test_a_wrong_instruction_set_leaves_the_rest_of_the_report(tmp_path):
    report = tmp_path / "report.json"
    run = subprocess.run(  # the choice is made once in a process
        [sys.executable, "-m", "zsseg_rt", "doctor", "--json", report],
        env={**os.environ, "ZSSEG_CPU_ISA": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 4, run.stderr
    findings = {found["topic"]: found for found in json.loads(report.read_text())["findings"]}
    assert findings["native core"]["status"] == "bad"
    assert "got 'abacus'" in findings["native core"]["detail"]
    assert "Unset ZSSEG_CPU_ISA" in findings["native core"]["remedy"]
    assert {"python", "CUDA", "OpenVINO", "OpenCV", "cache"} <= findings.keys()


@pytest.mark.parametrize(
    "kind", ["file", "under a file", "loop", "dangling", "long", "bytes", "bytes under a file"]
)
def test_any_cache_folder_gets_a_line(tmp_path, monkeypatch, kind):
    home = tmp_path / "home"
    if kind in ("file", "under a file", "bytes under a file"):
        home.write_text("x")
    elif kind in ("loop", "dangling"):
        home.symlink_to(home if kind == "loop" else tmp_path / "absent")
    places = {
        "under a file": home / "x",
        "bytes under a file": home / "x",
        "long": tmp_path / ("x" * 300),
    }
    place = os.fsencode(places.get(kind, home)) + (b"\xff" if "bytes" in kind else b"")
    monkeypatch.setenv("ZSSEG_HOME", os.fsdecode(place))
    found = finding("cache")
    assert found.status == ("ok" if kind == "bytes" else "bad")
    assert found.detail.encode()
    assert kind == "bytes" or "Set ZSSEG_HOME" in found.remedy


@pytest.mark.parametrize(
    ("installed", "capability", "told"),
    [
        (
            ("torch",),
            "8.7",
            "precision auto is torch float16, bfloat16 of bundles in",
        ),
        (("torch",), "7.5", "precision auto is torch float16, float32 of bundles in"),
        (("tensorrt",), "8.7", "precision auto is tensorrt float16, float32 of bundles"),
        ((), "8.7", "no backend for it is installed"),
    ],
)
def test_the_gpu_s_precision_is_told(monkeypatch, installed, capability, told):
    properties = {"name": "Orin", "compute_capability": capability}
    monkeypatch.setattr(_C, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(_C, "cuda_device_properties", lambda index: properties)
    monkeypatch.setattr(registry, "is_installed", lambda name: name in installed)
    assert f"cuda:0 Orin sm {capability}; {told}" in finding("CUDA").detail


def test_the_report_needs_no_native_core():
    code = """
import sys
sys.modules["zsseg_rt._C"] = None
from zsseg_rt.doctor import examine
print({found.topic: found.status for found in examine()}["native core"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "bad", run.stderr
