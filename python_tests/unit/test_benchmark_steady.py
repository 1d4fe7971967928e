"""The benchmark of steadying runs, and on one clip steadying does what it is for."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from support.streams import write_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "benchmark_steady", ROOT / "benchmarks" / "steady.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_steadied_clips_flicker_less_and_lose_nothing(benchmark, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    still, moving = (np.repeat(rng.integers(0, 256, (n, 8, 10, 3), np.uint8), 8, 1).repeat(8, 2)
                     for n in (1, 12))  # fmt: skip
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "still.mp4", list(still) * 12, gop=1)
    write_video(videos / "moving.mp4", list(moving), gop=1)
    report = tmp_path / "report.json"
    assert benchmark.main(["--quick", "--videos", str(videos), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    for speed in ("0.0", "4.0"):
        plain, steady = found["steady"][speed]["per_frame"], found["steady"][speed]["steady"]
        assert 0 < steady["flicker"] < 0.6 * plain["flicker"]
        assert steady["miou"] > plain["miou"] - 1.0
    skipped = found["skip_still"]
    assert skipped["moving.mp4"]["reused_share"] == 0.0
    assert skipped["still.mp4"]["reused_share"] > 0.7
    assert skipped["still.mp4"]["equal_share"] > 0.8  # coding makes its frames differ a little
    assert skipped["moving.mp4"]["equal_share"] == 1.0
    assert found["machine"]["cpu"]
    assert found["commit"]
    assert "flicker %" in capsys.readouterr().out
