"""Buffers are reused, streams wait as they are told; clocks and NVTX ranges name stages."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from support import command_line
from support.errors import refused
from zsseg_rt import Engine, EngineConfig, config
from zsseg_rt.cli.output import EXIT_ENVIRONMENT
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.errors import BackendUnavailableError, ShapeError
from zsseg_rt.photos import read_photo
from zsseg_rt.runtime import workspace
from zsseg_rt.runtime.workspace import StageClock, Workspace


def test_a_lane_s_stream_waits_as_it_is_told(monkeypatch):
    """A stream that sleeps lets its core go; None is what suits the GPU."""
    streams = []

    def stream(device, *, sleeps):
        streams.append((device, sleeps))
        return SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(workspace, "core", SimpleNamespace(Stream=stream))
    for sleeps in (False, True, None):
        Workspace("cuda:2", sleeps=sleeps).close()
    assert streams == [(2, False), (2, True), (2, None)]


@pytest.mark.parametrize(
    ("wait", "cpus", "sleeps"),
    [("auto", 8, True), ("auto", 9, None), ("sleep", 64, True), ("spin", 1, False)],
)
def test_auto_sleeps_where_cpus_are_few(monkeypatch, wait, cpus, sleeps):
    monkeypatch.setattr(config, "threads_in_quota", lambda: cpus)
    assert EngineConfig(wait=wait).sleeps is sleeps


def test_buffers_are_reused_and_grow():
    space = Workspace("cpu")
    large = space.array("a", (4, 5), np.float32)
    small = space.array("a", (2, 3), np.float32)
    assert np.shares_memory(small, large)
    assert small.shape == (2, 3)
    larger = space.array("a", (9, 9), np.float32)
    assert not np.shares_memory(larger, large)
    assert not np.shares_memory(larger, space.array("b", (9, 9), np.float32))
    assert space.array("a", (2, 2), np.uint8).dtype == np.uint8


def test_clock_names_every_stage_and_adds_up():
    clock = StageClock()
    for _ in range(2):  # a clock serves frame after frame
        clock.start()
        clock.mark("preprocess")
        clock.mark("check")
        times = clock.times()
        assert list(times) == ["preprocess", "check", "total"]
        assert times["total"] == pytest.approx(times["preprocess"] + times["check"])


def test_a_clock_that_may_take_no_event_times_whole_frames(monkeypatch):
    recorded = []
    monkeypatch.setattr(workspace.core, "Event", recorded.append)
    clock = StageClock(SimpleNamespace(device=0, handle=7), enabled=None)
    for _ in range(2):
        clock.start()
        clock.mark("preprocess")
        assert list(clock.times()) == ["total"]
        assert clock.times()["total"] > 0
    assert recorded == []
    for clock, names in (
        (StageClock(enabled=None), ["check", "total"]),
        (Workspace("cpu").clock, []),
    ):
        clock.start()  # on the CPU stages cost no event; a workspace's clock is off
        clock.mark("check")
        assert list(clock.times()) == names


# --- NVTX, with a module that stands in for the package ---


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
