"""How often a frame calls CUDA, counted by the emulated GPU: the figures may only fall."""

from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import FIELDS, counts_reader
from support.device_backend import device_backend
from support.host_backend import HostSession, host_backend
from zsseg_rt import Bundle, Engine, EngineConfig, FrameMemory, ops

pytestmark = pytest.mark.needs_cuda

STORED = Path(__file__).parents[1] / "bundles" / "v1"
# What a frame of family descriptor takes after the first, the graphs apart.
BUDGET = {
    "launches": 4,
    "allocations": 0,
    "frees": 0,
    "pinned_allocations": 0,
    "pinned_frees": 0,
    "copies_to_device": 1,  # the frame
    "copies_to_host": 1,  # the labels
    "copies_on_device": 0,
    "events_made": 0,
    "stream_waits": 0,
    "host_waits": 1,
}


# What a replayed frame takes where classes are decided on the host. ZegFormer's has two batches of
# regions here, each a graph, the indices of its regions and their embeddings; the host waits before
# it chooses regions, before it weighs opinions, and for the labels.
LOOKED_AT = {
    "segment_tokens": {"launches": 4, "copies_to_host": 3, "host_waits": 1, "graph_launches": 1},
    "proposals": {
        "launches": 10,
        "copies_to_device": 4,
        "copies_to_host": 6,
        "host_waits": 3,
        "graph_launches": 4,
    },
}


# Families whose frame the host waits for at its end alone.
REPLAYED = {
    "descriptor": {"graph_launches": 1},
    "dense": {"graph_launches": 1, "launches": 3},
    "aggregation": {"graph_launches": 2},
}
# A moved past is one launch more, and takes a field of motion and one of weights.
WITH_MEMORY = {"launches": 5, "copies_to_device": 3, "graph_launches": 1}


@pytest.fixture
def counts():
    """Reads what the emulated GPU has counted so far."""
    require_cuda()
    return counts_reader()


def test_the_counts_tell_what_was_asked_for(counts):
    stream = ops.Stream(0)
    before = counts()
    array = ops.DeviceArray.from_numpy(np.ones((4, 5), np.float32), 0, stream.handle)
    flag = ops.all_finite(array, stream=stream.handle)
    flag.numpy(stream.handle)
    event = ops.Event(0)
    event.record(stream.handle)
    event.synchronize()
    del array, flag
    found = {name: count - before[name] for name, count in counts().items()}
    assert (found["launches"], found["allocations"], found["frees"]) == (2, 2, 2)
    assert (found["copies_to_device"], found["copies_to_host"]) == (1, 1)
    assert (found["events_made"], found["events_recorded"]) == (1, 1)
    assert found["host_waits"] >= 2


def test_memory_comes_from_a_pool_that_keeps_some(counts):
    """CUDA's own pool gives freed memory back to the driver whenever a stream is waited for."""
    before = counts()
    array = ops.DeviceArray.from_numpy(np.ones(3, np.float32))
    found = {name: count - before[name] for name, count in counts().items()}
    assert array.shape == (3,)
    assert found["allocations"] == found["kept_allocations"] == 1


@pytest.fixture
def frame_counts(counts, monkeypatch):
    """What one frame costs, once the engine has seen one of its size; the graphs are left out."""
    placed = host_backend(monkeypatch, "own arrays")
    rng = np.random.default_rng(5)
    frame = rng.integers(0, 256, (81, 77, 3), np.uint8)
    graphs, kept = dict.fromkeys(FIELDS, 0), []
    run = HostSession.run

    def apart(self, feeds, *, stream=0):
        before = counts()
        results = run(self, feeds, stream=stream)
        for name, count in counts().items():
            graphs[name] += count - before[name]
        kept.append(results)  # so that nothing of theirs is freed meanwhile
        return results

    monkeypatch.setattr(HostSession, "run", apart)

    def count(bundle, **settings):
        path = STORED / f"{bundle}.zsseg"
        config = EngineConfig(precision="float32", use_cache=False, **placed, **settings)
        with Engine(path, config) as engine:
            engine.set_classes(list(Bundle.load(path).text_bank.names))
            engine.segment(frame)
            engine.segment(frame)
            for name in graphs:
                graphs[name] = 0
            before = counts()
            engine.segment(frame)
            after = counts()
        return {name: after[name] - before[name] - graphs[name] for name in FIELDS}

    return count


@pytest.mark.parametrize("with_times", [False, True])
def test_a_descriptor_frame_keeps_to_its_budget(frame_counts, with_times):
    found = frame_counts("descriptor", with_times=with_times)
    assert {name: found[name] for name in BUDGET if found[name] > BUDGET[name]} == {}


@pytest.mark.parametrize("bundle", REPLAYED)
@pytest.mark.parametrize("with_times", [False, True])
def test_a_replayed_frame_keeps_to_the_same_budget(counts, monkeypatch, bundle, with_times):
    placed, sessions = device_backend(monkeypatch)
    path = STORED / f"{bundle}.zsseg"
    config = EngineConfig(precision="float32", use_cache=False, with_times=with_times, **placed)
    frame = np.random.default_rng(5).integers(0, 256, (81, 77, 3), np.uint8)
    with Engine(path, config) as engine:
        names = list(Bundle.load(path).text_bank.names)
        engine.set_classes(names)
        for _ in range(3):
            engine.segment(frame)
        engine.set_classes(names[:-1])  # of the same bucket
        engine.segment(frame)
        before, runs = counts(), [session.runs for session in sessions]
        engine.segment(frame)
        found = {name: count - before[name] for name, count in counts().items()}
        assert [session.runs for session in sessions] == runs
        in_graphs = sum(len(session.outputs) for session in sessions)
    found["launches"] -= in_graphs
    budget = BUDGET | REPLAYED[bundle]
    assert {name: found[name] for name in budget if found[name] > budget[name]} == {}


def test_a_frame_with_a_memory_keeps_to_its_budget(counts, monkeypatch):
    """All up to its logits is one graph."""
    pytest.importorskip("cv2")
    placed, sessions = device_backend(monkeypatch)
    path = STORED / "descriptor.zsseg"
    config = EngineConfig(precision="float32", use_cache=False, **placed)
    frame, memory = np.random.default_rng(5).integers(0, 256, (81, 77, 3), np.uint8), FrameMemory()
    with Engine(path, config) as engine:
        engine.set_classes(list(Bundle.load(path).text_bank.names))
        for _ in range(4):
            engine.segment(frame, memory=memory)
        before, runs = counts(), [session.runs for session in sessions]
        engine.segment(frame, memory=memory)
        found = {name: count - before[name] for name, count in counts().items()}
        assert [session.runs for session in sessions] == runs
        found["launches"] -= sum(len(session.outputs) for session in sessions)
    budget = BUDGET | WITH_MEMORY
    assert {name: found[name] for name in budget if found[name] > budget[name]} == {}


@pytest.mark.parametrize("bundle", ["dense", "descriptor", "proposals", "segment_tokens"])
@pytest.mark.parametrize(("settings", "has_stages"), [({}, False), ({"with_times": True}, True)])
def test_recorded_frames_have_events_only_where_stages_are_timed(
    counts, monkeypatch, bundle, settings, has_stages
):
    placed, _ = device_backend(monkeypatch)
    path = STORED / f"{bundle}.zsseg"
    settings = settings | {"wait": "spin"}  # a wait that sleeps is an event, behind the graph
    config = EngineConfig(precision="float32", use_cache=False, **placed, **settings)
    frame = np.random.default_rng(5).integers(0, 256, (81, 77, 3), np.uint8)
    with Engine(path, config) as engine:
        engine.set_classes(list(Bundle.load(path).text_bank.names))
        for _ in range(3):
            engine.segment(frame)
        before = counts()
        times = engine.segment(frame).times
        found = {name: count - before[name] for name, count in counts().items()}
    assert found["graph_launches"] >= 1
    assert (found["events_recorded"] > 0) == has_stages
    assert ("image_encoder" in times) == has_stages
    assert times["total"] > 0


@pytest.mark.parametrize("bundle", LOOKED_AT)
def test_a_replayed_frame_that_the_host_looks_at_keeps_to_its_budget(counts, monkeypatch, bundle):
    placed, sessions = device_backend(monkeypatch)
    path = STORED / f"{bundle}.zsseg"
    config = EngineConfig(precision="float32", use_cache=False, **placed)
    frame = np.random.default_rng(5).integers(0, 256, (81, 77, 3), np.uint8)
    with Engine(path, config) as engine:
        names = list(Bundle.load(path).text_bank.names)
        engine.set_classes(names)
        for _ in range(3):
            engine.segment(frame)
        engine.set_classes(names[:3])  # of the same bucket
        engine.segment(frame)
        before, runs = counts(), [session.runs for session in sessions]
        engine.segment(frame)
        found = {name: count - before[name] for name, count in counts().items()}
        assert [session.runs for session in sessions] == runs
    batches = found["graph_launches"] - 2
    found["launches"] -= sum(
        len(session.outputs) * (batches if session.outputs[0].name == "region_embeds" else 1)
        for session in sessions
    )
    budget = BUDGET | LOOKED_AT[bundle]
    assert {name: found[name] for name in budget if found[name] > budget[name]} == {}


@pytest.mark.parametrize(("bundle", "waits"), [("segment_tokens", 1), ("proposals", 3)])
def test_a_frame_waits_before_each_look_of_the_host(frame_counts, bundle, waits):
    assert frame_counts(bundle)["host_waits"] == waits


@pytest.mark.parametrize(
    ("with_overlay", "planes"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_an_overlay_takes_no_launch_of_its_own_but_on_planes(
    counts, monkeypatch, with_overlay, planes
):
    placed, sessions = device_backend(monkeypatch)
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    path = STORED / "descriptor.zsseg"
    config = EngineConfig(precision="float32", use_cache=False, **placed)
    rng = np.random.default_rng(5)
    shapes = [(80, 76), (40, 38, 2)] if planes else [(81, 77, 3)]
    with Engine(path, config) as engine:
        engine.set_classes(list(Bundle.load(path).text_bank.names))
        arrays = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        placed_arrays = tuple(ops.DeviceArray.from_numpy(array, 0) for array in arrays)
        on_gpu = placed_arrays if planes else placed_arrays[0]
        for _ in range(2):
            engine.segment_device(on_gpu, with_overlay=with_overlay)
        before = counts()
        found = engine.segment_device(on_gpu, with_overlay=with_overlay)
        launches = counts()["launches"] - before["launches"]
        in_graphs = sum(len(session.outputs) for session in sessions)
    assert launches - in_graphs == BUDGET["launches"] + (with_overlay and planes)
    assert (found.picture is not None) == with_overlay


@pytest.mark.parametrize("bundle", ["dense", "descriptor", "proposals", "segment_tokens"])
@pytest.mark.parametrize("with_scores", [False, True])
def test_a_frame_allocates_nothing(frame_counts, bundle, with_scores):
    found = frame_counts(bundle, with_scores=with_scores)
    assert (found["allocations"], found["frees"], found["events_made"]) == (0, 0, 0)
