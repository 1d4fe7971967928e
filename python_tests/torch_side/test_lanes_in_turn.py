"""Two frames in flight on a GPU, the emulated one included: the same labels, calls and order."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import counts_reader
from support.device_backend import device_backend
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.ops import core
from zsseg_rt.runtime.graph_turns import GraphTurns

pytestmark = pytest.mark.needs_cuda

STORED = Path(__file__).parents[1] / "bundles" / "v1" / "descriptor.zsseg"
CAMERA = "test://?size=64x48&rate=500"


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Skip, or fail where a GPU is required."""
    require_cuda()


@pytest.fixture
def placed(monkeypatch):
    return device_backend(monkeypatch)[0]


def label(placed, num_lanes, read, count=40):
    """Label a camera, and return what its frames asked the GPU for after the first forty."""
    config = {"precision": "float32", "use_cache": False, "num_lanes": num_lanes} | placed
    with Engine(STORED, EngineConfig(**config)) as engine:
        rows = np.random.default_rng(0).normal(size=(9, engine.bundle.text.embed_dim))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        engine.set_classes([f"name {number}" for number in range(9)], embeddings=rows)
        found = []
        with engine.stream(CAMERA) as stream:
            for number in range(40 + count):
                if number == 40:  # buffers, captures and events are made
                    before = read()
                seg = next(stream)
                found.append((seg.frame, seg.labels.copy()))
            after = read()
        for frame, labels in found:
            np.testing.assert_array_equal(labels, engine.segment(frame.image).labels)
    for (one, _), (two, _) in itertools.pairwise(found):
        assert two.index == one.index + 1 + two.dropped_before
    return {name: after[name] - before[name] for name in after}


def test_two_frames_in_flight_ask_the_gpu_for_what_one_asks(placed):
    """Each frame's graphs wait on the GPU for those before, between two events."""
    read, count = counts_reader(), 40
    one, two = (label(placed, lanes, read, count) for lanes in (1, 2))
    assert one["stream_waits"] == 0
    assert abs(two["stream_waits"] - count) <= 2  # a frame or two that were begun or not
    assert abs(two["events_recorded"] - one["events_recorded"] - 2 * count) <= 6
    for name in ("launches", "graph_launches", "host_waits", "copies_to_device", "copies_to_host"):
        assert abs(two[name] - one[name]) <= 2 * one[name] / count, name
    for name in ("events_made", "allocations", "kept_allocations", "pinned_allocations"):
        assert two[name] == one[name] == 0, name


def test_a_turn_that_fails_ends_too():
    """What it enqueued runs: the next turn waits for that, and it took no negative time."""
    turns, streams = GraphTurns("cuda:0"), [core.Stream(0), core.Stream(0)]
    turns.is_on = True
    for _ in range(2):
        with pytest.raises(KeyError), turns.turn(streams[0].handle):
            raise KeyError
        streams[0].synchronize()
        assert turns.last()[1] >= 0.0
    read = counts_reader()
    before = read()["stream_waits"]
    with turns.turn(streams[1].handle):
        pass
    assert read()["stream_waits"] == before + 1
