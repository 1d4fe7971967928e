"""Engines and lanes in a forked process, and parts that are freed when they are closed."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from support.command_line import python
from support.errors import refused
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.common.process import OwnProcess, refuse_gpu_after_fork
from zsseg_rt.errors import BackendError, DeviceError, EngineStateError

SCRIPT = """
import os, sys
from zsseg_rt import Bundle, Engine, EngineConfig, EngineStateError, read_photo
from zsseg_rt.demo import demo_photos

engine = Engine(Bundle.demo("scenes"), EngineConfig(num_lanes=2))
engine.set_classes(["ball", "wall"])
frame, lane = read_photo(demo_photos("scenes")[0]), engine.lane()
stream = engine.stream("test://?frames=9", policy="latest")
engine.segment(frame), next(stream)
doors = {
    "segment": lambda: engine.segment(frame),
    "batch": lambda: engine.segment_batch([frame]),
    "classes": lambda: engine.set_classes(["box"]),
    "stream": lambda: engine.stream("test://?frames=1"),
    "open lane": engine.lane,
    "lane": lambda: lane.segment(frame),
    "next frame": lambda: next(stream),
}
if os.fork() == 0:
    for door, call in doors.items():
        try:
            print(door, call())
        except EngineStateError as exc:
            print(door, "refused", "Make the engine in this process" in str(exc), flush=True)
    stream.close(), lane.close(), engine.close()
    with Engine(Bundle.demo("scenes")) as own:
        own.set_classes(["ball"])
        print("own", own.segment(frame).labels.shape == frame.shape[:2], flush=True)
    sys.exit(5)  # where everything is freed
print("ended", os.wait()[1] >> 8)
"""


def test_every_door_of_an_engine_is_refused_after_a_fork_and_a_new_one_works():
    ran = python("-c", SCRIPT)
    *doors, own, ended = ran.stdout.splitlines()
    assert len(doors) == 7, ran.stderr
    assert all(line.endswith("refused True") for line in doors), doors
    assert (own, ended) == ("own True", "ended 5")


class Owner:
    """An engine, as far as a fork is concerned."""


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_error_names_the_fork_on_a_gpu_too(device):
    owner = Owner()
    process = OwnProcess(owner, device)
    process.require()
    refuse_gpu_after_fork("cuda:0")
    reader, writer = os.pipe()
    if os.fork() == 0:
        errors = []
        for refuse in (process.require, lambda: refuse_gpu_after_fork("auto")):
            try:
                refuse()
            except (EngineStateError, DeviceError) as exc:
                errors.append(str(exc))
        os.write(writer, "\n".join(errors).encode())
        os._exit(0)
    os.wait()
    own, *opening = os.read(reader, 4096).decode().splitlines()
    assert "forked" in own
    assert (len(opening) == 1) is ("spawn" in own) is (device != "cpu")


@pytest.fixture
def lane(monkeypatch):
    """A lane, and what becomes of its parts, in order."""
    stored = Path(__file__).parents[1] / "bundles" / "v1" / "dense.zsseg"
    config = EngineConfig(device="cpu", precision="float32", use_cache=False, num_lanes=2)
    engine, journal = Engine(stored, config), []
    engine.set_classes(["red", "blue"])
    lane = engine.lane()
    wait, close = lane.workspace.synchronize, lane.workspace.close
    monkeypatch.setattr(lane.workspace, "synchronize", lambda: (journal.append("wait"), wait()))
    monkeypatch.setattr(lane.workspace, "close", lambda: (journal.append("workspace"), close()))
    for session in lane.sessions.values():
        monkeypatch.setattr(session, "close", lambda: journal.append("session"))
    yield lane, journal
    monkeypatch.undo()
    engine.close()


FRAME = np.zeros((20, 30, 3), np.uint8)


def fail(*arguments, **settings):
    raise BackendError("the device is lost")


@pytest.mark.parametrize("failing", ["nothing", "run", "synchronize", "close"])
def test_a_lane_waits_before_it_frees_and_frees_all_whatever_fails(lane, monkeypatch, failing):
    lane, journal = lane
    lane.segment(FRAME)
    owner = lane.workspace if failing == "synchronize" else lane.sessions["image_encoder"]
    if failing != "nothing":
        monkeypatch.setattr(owner, failing, fail)
    lost = pytest.raises(BackendError, match="the device is lost")
    if failing == "run":
        with lost:
            lane.segment(FRAME)
    journal.clear()
    with lost if failing in ("synchronize", "close") else nullcontext():
        lane.close()
    parts = {"synchronize": "wait", "close": "session", "": "workspace"}
    freed = [part for step, part in parts.items() if step != failing]
    assert journal[: len(freed)] == freed
    with refused(EngineStateError, "lane"):
        lane.segment(FRAME)
    lane.close()  # harmless, though the first call failed
