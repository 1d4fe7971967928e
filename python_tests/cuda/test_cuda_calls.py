"""How often a frame calls CUDA, counted by the emulated GPU: the figures may only fall."""

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import counts_reader
from support.device_backend import device_backend
from support.frame_kinds import half_bundle, on_device, open_engine
from zsseg_rt import FrameMemory, ops

pytestmark = pytest.mark.needs_cuda

NAMES = [f"name {index}" for index in range(7)]
# What a frame of family descriptor takes after the first, the graphs apart.
BUDGET = {
    **{"launches": 4, "host_waits": 1, "stream_waits": 0, "events_made": 0, "allocations": 0},
    **{"copies_to_device": 1, "copies_to_host": 1, "copies_on_device": 0},  # frame, labels
    **{"frees": 0, "pinned_allocations": 0, "pinned_frees": 0},
}
# What a replayed frame takes. Where classes are decided on the host, it looks at results before the
# labels: ZegFormer's frame has two batches of regions here, each a graph, the indices of its
# regions and their embeddings; the host waits before it chooses regions, before it weighs opinions,
# and for the labels.
REPLAYED = {
    "descriptor": {"graph_launches": 1},
    "descriptor in half": {"graph_launches": 1},
    "clip_rc in half": {"graph_launches": 1},
    "dense": {"graph_launches": 1, "launches": 3},
    "aggregation": {"graph_launches": 2},
    "segment_tokens": {"copies_to_host": 3, "graph_launches": 1},
    "proposals": {
        "launches": 10, "copies_to_device": 4, "copies_to_host": 6, "host_waits": 3,
        "graph_launches": 4,
    },
}  # fmt: skip
# A moved past is one launch more, and takes a field of motion and one of weights.
WITH_MEMORY = {"launches": 5, "copies_to_device": 3, "graph_launches": 1}
FRAME = np.random.default_rng(5).integers(0, 256, (81, 77, 3), np.uint8)


@pytest.fixture
def counts():
    """Reads what the emulated GPU has counted so far."""
    require_cuda()
    return counts_reader()


def test_memory_comes_from_a_pool_that_keeps_some(counts):
    """CUDA's own pool gives freed memory back to the driver whenever a stream is waited for."""
    before = counts()
    array = ops.DeviceArray.from_numpy(np.ones(3, np.float32))
    calls = {name: count - before[name] for name, count in counts().items()}
    assert array.shape == (3,)
    assert calls["allocations"] == calls["kept_allocations"] == 1


@pytest.fixture
def calls_of(counts, monkeypatch, tmp_path):
    """Calls of a frame, after others and other classes; the graphs apart."""
    placed, sessions = device_backend(monkeypatch)

    def count(bundle, memory=None, **settings):
        if bundle.endswith("in half"):
            bundle = half_bundle(bundle.partition(" ")[0], tmp_path)
            settings["precision"] = "auto"
        with open_engine(bundle, placed, **{"with_scores": False} | settings) as engine:
            is_half = not isinstance(bundle, str)
            names = NAMES if is_half else list(engine.bundle.text_bank.names)
            engine.set_classes(names)
            for _ in range(3):
                engine.segment(FRAME, memory=memory)
            engine.set_classes(names[::-1] if is_half else names[:-1])  # of the same bucket
            for _ in range(1 if memory is None else 3):
                engine.segment(FRAME, memory=memory)
            before, runs = counts(), sum(session.runs for session in sessions)
            times = engine.segment(FRAME, memory=memory).times
            calls = {name: count - before[name] for name, count in counts().items()}
            calls["graphs' runs"] = sum(session.runs for session in sessions) - runs
        batches = calls["graph_launches"] - 2
        calls["launches"] -= sum(
            len(session.outputs) * (batches if session.outputs[0].name == "region_embeds" else 1)
            for session in sessions
        )
        return calls, times

    return count


def over(budget, calls):
    """Calls made more often than they may be."""
    return {name: calls[name] for name in budget if calls[name] > budget[name]}


@pytest.mark.parametrize("with_times", [False, True])
def test_a_descriptor_frame_keeps_to_its_budget(calls_of, monkeypatch, with_times):
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    calls, _ = calls_of("descriptor", with_times=with_times)
    assert over(BUDGET | {"graph_launches": 0}, calls) == {}
    assert calls["graphs' runs"] == 2


@pytest.mark.parametrize("with_times", [None, True])
@pytest.mark.parametrize("bundle", REPLAYED)
def test_a_replayed_frame_keeps_to_its_budget(calls_of, bundle, with_times):
    """Its stages have events only where they are timed."""
    calls, times = calls_of(bundle, with_times=with_times, wait="spin")  # sleeping takes an event
    assert over(BUDGET | REPLAYED[bundle] | {"graphs' runs": 0}, calls) == {}
    assert calls["graph_launches"] >= 1
    assert (calls["events_recorded"] > 0) == bool(with_times) == ("image_encoder" in times)
    assert times["total"] > 0


def test_a_frame_with_a_memory_keeps_to_its_budget(calls_of):
    """All up to its logits is one graph."""
    pytest.importorskip("cv2")
    calls, _ = calls_of("descriptor", FrameMemory(), with_times=False)
    assert over(BUDGET | WITH_MEMORY | {"graphs' runs": 0}, calls) == {}


@pytest.mark.parametrize(
    ("with_overlay", "planes"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_an_overlay_takes_no_launch_of_its_own_but_on_planes(
    counts, monkeypatch, with_overlay, planes
):
    placed, sessions = device_backend(monkeypatch)
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    rng = np.random.default_rng(5)
    shapes = [(80, 76), (40, 38, 2)] if planes else [(81, 77, 3)]
    with open_engine("descriptor", placed) as engine:
        engine.set_classes(NAMES)
        arrays = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        on_gpu = on_device(tuple(arrays) if planes else arrays[0])
        for _ in range(2):
            engine.segment_device(on_gpu, with_overlay=with_overlay)
        before = counts()
        result = engine.segment_device(on_gpu, with_overlay=with_overlay)
        launches = counts()["launches"] - before["launches"]
        in_graphs = sum(len(session.outputs) for session in sessions)
    assert launches - in_graphs == BUDGET["launches"] + (with_overlay and planes)
    assert (result.picture is not None) == with_overlay
