"""Buffers are reused, streams wait as they are told, and clocks name stages."""

from types import SimpleNamespace

import numpy as np
import pytest

from zsseg_rt import config
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
    assert config.EngineConfig(wait=wait).sleeps is sleeps


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
