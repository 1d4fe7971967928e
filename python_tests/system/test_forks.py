"""Engines, lanes and streams in a process that was forked from the one that made them."""

import os
import subprocess
import sys

import pytest

from zsseg_rt.common.process import OwnProcess, refuse_gpu_after_fork
from zsseg_rt.errors import DeviceError, EngineStateError

SCRIPT = """
import os, sys
from zsseg_rt import Bundle, Engine, EngineConfig, EngineStateError, read_photo
from zsseg_rt.demo import demo_photos

engine = Engine(Bundle.demo(), EngineConfig(num_lanes=2))
engine.set_classes(["dog", "person"])
frame, lane = read_photo(demo_photos()[0]), engine.lane()
stream = engine.stream("test://?frames=9", policy="latest")
engine.segment(frame), next(stream)
doors = {
    "segment": lambda: engine.segment(frame),
    "batch": lambda: engine.segment_batch([frame]),
    "classes": lambda: engine.set_classes(["cat"]),
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
    with Engine(Bundle.demo()) as own:
        own.set_classes(["dog"])
        print("own", own.segment(frame).labels.shape == frame.shape[:2], flush=True)
    sys.exit(5)  # where everything is freed
print("ended", os.wait()[1] >> 8)
"""


def test_every_door_of_an_engine_is_refused_after_a_fork_and_a_new_one_works():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], text=True, capture_output=True, timeout=60)
    *doors, own, ended = ran.stdout.splitlines()
    assert len(doors) == 7, ran.stderr
    assert all(line.endswith("refused True") for line in doors), doors
    assert (own, ended) == ("own True", "ended 5")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_error_names_the_fork_on_a_gpu_too(device):
    class Owner:
        pass

    owner = Owner()
    process = OwnProcess(owner, device)
    process.require()
    refuse_gpu_after_fork("cuda:0")
    reader, writer = os.pipe()
    if os.fork() == 0:
        told = []
        for refuse in (process.require, lambda: refuse_gpu_after_fork("auto")):
            try:
                refuse()
            except (EngineStateError, DeviceError) as exc:
                told.append(str(exc))
        os.write(writer, "\n".join(told).encode())
        os._exit(0)
    os.wait()
    own, *opening = os.read(reader, 4096).decode().splitlines()
    assert "forked" in own
    assert (len(opening) == 1) is ("spawn" in own) is (device != "cpu")
