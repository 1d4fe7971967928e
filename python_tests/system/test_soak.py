"""The soak script: its short form finds what leaks, and reports what it measured."""

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.required import without_streams
from support.rtsp_camera import what_is_missing

pytest.importorskip("av")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soak():
    return importlib.import_module("tools.torture.soak")


@pytest.mark.nightly
def test_a_short_run_is_within_its_limits(tmp_path):
    if what_is_missing():
        without_streams(what_is_missing())
    report = tmp_path / "soak.json"
    call = [sys.executable, "-m", "tools.torture.soak", "--minutes", "0.2", "--reconnects", "2"]
    call += ["--json", report]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["exceeded"] == found["errors"] == []
    assert found["reconnects"] == 2
    assert len(found["age_ms"]) == 2
    assert all(ages["p50"] > 0 for ages in found["age_ms"].values())
    assert 0 < found["recorded"][0] <= sum(found["pictures"]["labelled"].values())
    assert found["threads"]["most"] == found["threads"]["first"] > 1
    assert 10.0 < found["given_out_mb"]["last"] < found["rss_mb"]["last"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_that_is_given_back_is_not_counted_as_in_use(soak):
    before = soak.given_out()
    rows = [np.ones(50_000) for _ in range(50)]  # 20 MB
    assert soak.given_out() - before == pytest.approx(20.0, abs=2.0)
    del rows
    assert soak.given_out() - before == pytest.approx(0.0, abs=2.0)


def test_growth_of_the_memory_in_use_is_told(soak):
    at = np.arange(10.0, 1210.0, 60.5)
    told = soak.given_out_report(np.array([at, 150.0 + 3.0 * at / 3600.0]))
    assert told["growth_per_hour"] == pytest.approx(3.0, abs=0.1)
    assert (told["first"], told["last"]) == (150.01, 150.97)
    assert "growth_per_hour" not in soak.given_out_report(np.array([[0.0], [1.0]]))


@pytest.mark.parametrize("per_hour", [0.0, 5.0])
def test_growth_is_told_from_noise_and_from_what_comes_and_goes(soak, per_hour):
    at = np.arange(0.0, 1440.0)
    rng = np.random.default_rng(3)
    values = 200.0 + per_hour * at / 3600.0 + rng.normal(0.0, 0.2, at.size)
    values[::7] += 10.0  # freed within the half minute
    slope, noise, medians = soak.growth(at, values, 30.0)
    assert len(medians) == 48
    assert slope == pytest.approx(per_hour, abs=0.5)  # measured: 0.1
    assert noise < 1.5


def report(**changes):
    found = {
        "minutes": 30.0,
        "failures_asked_for": 50,
        "reconnects": 50,
        "rss_mb": {"first": 200.0, "last": 201.0, "growth_per_hour": 1.5, "noise_per_hour": 0.6},
        "threads": {"first": 20, "last": 20, "most": 20},
        "descriptors": {"first": 12, "last": 12, "most": 12},
        "pictures": {"damaged": 0, "repeated": 0},
        "errors": [],
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        (
            {"rss_mb": {"first": 0, "last": 0, "growth_per_hour": 1.7, "noise_per_hour": 0.6}},
            ["memory grows by 1.7 MB per hour"],
        ),
        (
            {"minutes": 1.0, "rss_mb": {"first": 200.0, "last": 204.5}},
            ["memory grew from 200.0 to 204.5 MB"],
        ),
        ({"threads": {"first": 20, "last": 20, "most": 24}}, ["threads went from 20 to 24"]),
        ({"descriptors": {"first": 9, "last": 10, "most": 10}}, ["descriptors went from 9 to 10"]),
        ({"pictures": {"damaged": 0, "repeated": 2}}, ["2 pictures were repeated"]),
        ({"reconnects": 49}, ["49 of 50 reconnections"]),
        ({"errors": ["out.mp4: the disk is full"]}, ["out.mp4: the disk is full"]),
    ],
)
def test_each_limit_is_told_when_it_is_exceeded(soak, changes, told):
    assert soak.judge(report(**changes)) == told
