"""Frames and stages are NVTX ranges, with a module that stands in for the package."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from support import command_line
from support.errors import refused
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.cli.output import EXIT_ENVIRONMENT
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.errors import BackendUnavailableError, ShapeError
from zsseg_rt.photos import read_photo

CPU = {"device": "cpu", "num_threads": 1, "use_cache": False, "num_lanes": 2}


@pytest.fixture
def ranges(monkeypatch):
    """Keeps ranges as paths in the order they ended, like a profiler that understands nesting."""
    recorded = SimpleNamespace(open=[], ended=[])

    def push_range(*, message, domain):
        assert domain == "zsseg_rt"
        recorded.open.append(message)

    def pop_range(*, domain):
        assert domain == "zsseg_rt"
        recorded.ended.append("/".join(recorded.open))
        recorded.open.pop()

    stand_in = SimpleNamespace(push_range=push_range, pop_range=pop_range)
    monkeypatch.setitem(sys.modules, "nvtx", stand_in)
    return recorded


@pytest.mark.parametrize("with_times", [True, False])
def test_every_stage_of_a_frame_is_a_range_in_the_frame_s(ranges, with_times):
    frame = read_photo(demo_photos("scenes")[0])
    config = EngineConfig(**CPU, with_nvtx=True, with_times=with_times)
    with Engine(demo_bundle("scenes"), config) as engine:
        engine.set_classes(demo_classes("scenes"))
        stages = [stage for stage in engine.segment(frame).times if stage != "total"]
        assert ranges.ended == ["frame"]  # no stage has been passed, so none has a name yet
        for _ in range(2):
            ranges.ended.clear()
            engine.segment(frame)
            assert ranges.ended[-1] == "frame"
            assert {"frame/preprocess", "frame/upsample_argmax"} <= set(ranges.ended)
            assert not stages or ranges.ended[:-1] == [f"frame/{stage}" for stage in stages]
            assert ranges.open == []
        with engine.lane() as lane:
            session = lane.sessions["image_encoder"]
            usual, session.run = session.run, None
            with pytest.raises(TypeError):  # in the middle of the frame: it has no masks
                lane.segment(frame)
            assert (ranges.open, ranges.ended[-1]) == ([], "frame")
            session.run = usual
            with pytest.raises(ShapeError):  # before it begins
                lane.segment(np.zeros((4, 4), np.uint8))
            lane.segment(frame)
            assert ranges.open == []


def test_an_absent_package_is_said_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with refused(BackendUnavailableError, "nvtx"):
        Engine(demo_bundle("scenes"), EngineConfig(**CPU, with_nvtx=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("zsseg_rt.profiling.profiler.ChildCandidate", None)  # nothing is measured
    assert command_line.run("profile", "--demo", "scenes", "--nvtx") == EXIT_ENVIRONMENT
    assert ".[nvtx]" in capsys.readouterr().err
