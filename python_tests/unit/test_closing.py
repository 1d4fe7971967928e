"""Closing waits for the frame under way, then frees every part, whatever another one does."""

from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import BackendError, EngineStateError

STORED = Path(__file__).parents[1] / "bundles" / "v1" / "dense.zsseg"
CONFIG = EngineConfig(device="cpu", precision="float32", use_cache=False, num_lanes=2)


@pytest.fixture
def journal():
    return []


@pytest.fixture
def lane(journal, monkeypatch):
    """A lane that notes what is waited for and freed."""
    engine = Engine(STORED, CONFIG)
    engine.set_classes(["red", "blue"])
    lane = engine.lane()
    wait, close = lane.workspace.synchronize, lane.workspace.close
    monkeypatch.setattr(lane.workspace, "synchronize", lambda: (journal.append("wait"), wait()))
    monkeypatch.setattr(lane.workspace, "close", lambda: (journal.append("workspace"), close()))
    for session in lane.sessions.values():
        monkeypatch.setattr(session, "close", lambda: journal.append("session"))
    yield lane
    monkeypatch.undo()
    engine.close()


FRAME = np.zeros((20, 30, 3), np.uint8)


def fail(*arguments, **settings):
    raise BackendError("the device is lost")


def test_a_lane_waits_before_it_frees(lane, journal):
    lane.segment(FRAME)
    journal.clear()
    lane.close()
    assert journal[:3] == ["wait", "session", "workspace"]


def test_a_lane_waits_also_after_a_frame_that_failed(lane, journal, monkeypatch):
    monkeypatch.setattr(lane.sessions["image_encoder"], "run", fail)
    with pytest.raises(BackendError, match="the device is lost"):
        lane.segment(FRAME)
    journal.clear()
    lane.close()
    assert journal[:3] == ["wait", "session", "workspace"]


@pytest.mark.parametrize("part", ["wait", "session"])
def test_a_part_that_fails_keeps_no_other_from_being_freed(lane, journal, monkeypatch, part):
    owner = lane.workspace if part == "wait" else lane.sessions["image_encoder"]
    monkeypatch.setattr(owner, "synchronize" if part == "wait" else "close", fail)
    with pytest.raises(BackendError, match="the device is lost"):
        lane.close()
    assert "workspace" in journal
    assert part == "session" or "session" in journal
    with refused(EngineStateError, "lane"):
        lane.segment(FRAME)
    journal.clear()
    lane.close()  # harmless, though the first call failed
    assert journal == []


def test_an_engine_frees_its_graphs_though_a_lane_fails(monkeypatch):
    engine = Engine(STORED, CONFIG)
    closed = []
    for name, graph in engine._graphs.items():
        monkeypatch.setattr(graph, "close", lambda name=name: closed.append(name))
    monkeypatch.setattr(engine._lane.workspace, "synchronize", fail)
    with pytest.raises(BackendError, match="the device is lost"):
        engine.close()
    assert closed == ["image_encoder"]
    with refused(EngineStateError, "engine"):
        engine.segment(FRAME)
