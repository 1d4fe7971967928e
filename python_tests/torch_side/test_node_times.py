"""Nodes of exported graphs are named after modules, and timed by every backend."""

from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from support.errors import refused
from support.fake_tensorrt import FakeNative, FakeTensorRT, GpuArray, install, write_graph
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.backends._openvino import PastRuns, node_times
from zsseg_rt.backends.base import OUTSIDE_NODES, BackendOptions, NodeTime, RecordingSession
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.errors import ConfigError

COUNTING = BackendOptions(num_threads=1, node_times=True)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_nodes_are_timed_under_the_graph_s_names(zegclip_bundle, backend):
    entry = Bundle.load(zegclip_bundle).graph("image_encoder", "float32")
    encoder = zegclip_bundle / entry.file
    graph = get_backend(backend).load(encoder, device="cpu", precision="float32", options=COUNTING)
    session = graph.session()
    feeds = {"image": np.random.default_rng(0).random(entry.inputs[0].shape, np.float32)}
    before = {name: np.array(array) for name, array in session.run(feeds).items()}
    nodes = session.profile(feeds, runs=5)
    names = [node.name for node in onnx.load(encoder).graph.node]
    assert len(set(names)) == len(names)
    assert {node.name for node in nodes} - {"", OUTSIDE_NODES} <= set(names)
    assert sum(node.ms for node in nodes) > 0.0
    assert all(node.ms >= 0.0 for node in nodes)
    modules = {node.name.partition("/")[0] for node in nodes}
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert {f"blocks.{index}.{part}" for index in range(4) for part in parts} <= modules
    for name, array in session.run(feeds).items():
        np.testing.assert_array_equal(array, before[name])
    session.close()


@pytest.mark.parametrize("before", [0, 5, 400])
def test_the_rest_is_of_the_runs_that_the_counters_count(before):
    """Of a node that takes 3 ms, after a first run in which it took 50."""
    past = PastRuns(count=1, ms=60.0)

    def run():
        past.count, past.ms = past.count + 1, past.ms + 4.0

    def counters():
        mean = timedelta(milliseconds=(47.0 + 3.0 * past.count) / past.count)
        node = {"status": "EXECUTED", "node_name": "a", "node_type": "MatMul", "real_time": mean}
        return [SimpleNamespace(**node)]

    runtime = SimpleNamespace(get_ordered_ops=list)
    model = SimpleNamespace(
        get_property={"PERF_COUNT": True}.get, get_runtime_model=lambda: runtime
    )
    for _ in range(before):
        run()
    request = SimpleNamespace(get_profiling_info=counters)
    node, rest = node_times(model, request, run, 10, past)
    if before <= 10:  # without the slow first run
        assert (node.ms, rest.ms) == (pytest.approx(3.0, abs=0.01), pytest.approx(1.0, abs=0.01))
    else:  # with its share
        assert node.ms == pytest.approx(3.0 + 47.0 / 411, abs=0.01)
        assert rest.ms == pytest.approx(1.0 + 9.0 / 411, abs=0.01)
    assert rest.name == OUTSIDE_NODES


def test_tensorrt_times_layers_in_a_context_of_their_own(tmp_path, monkeypatch):
    fake = install(monkeypatch, FakeTensorRT(), FakeNative())
    path = write_graph(tmp_path)
    graph = get_backend("tensorrt").load(
        path, device="cuda:0", precision="auto", options=BackendOptions()
    )
    session = graph.session()
    feeds = {"x": GpuArray(np.zeros((1, 4, 8), np.float32), 0x1000)}
    nodes = session.profile(feeds, stream=7, runs=4)
    assert nodes == (
        NodeTime(name="blocks.0/MatMul + blocks.0/Add", type="", ms=0.25),
        NodeTime(name="softmax", type="", ms=0.25),
    )
    assert fake.journal.count("execute on 7") == 5
    assert session._context.profiler is None  # it would slow down every later frame


@pytest.mark.parametrize("bundle", ["zegclip_bundle", "colour_bundle"])
def test_an_engine_times_its_graphs_on_a_frame(bundle, request):
    config = EngineConfig(device="cpu", num_threads=1, with_node_times=True, use_cache=False)
    frame = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    with Engine(request.getfixturevalue(bundle), config) as engine:
        embeddings = np.eye(3, engine.bundle.text.embed_dim, dtype=np.float32)
        engine.set_classes(["a", "b", "c"], embeddings=embeddings)
        labels = engine.segment(frame).labels
        times = engine.node_times(frame, runs=2)
        assert set(times) == {name for name in engine.bundle.graphs if name != "text_encoder"}
        assert all(nodes for nodes in times.values())
        np.testing.assert_array_equal(engine.segment(frame).labels, labels)
    plain = EngineConfig(device="cpu", use_cache=False)
    with Engine(engine.bundle, plain) as engine, refused(ConfigError, "with_node_times"):
        engine.node_times(frame)


def test_a_graph_that_runs_often_counts_as_often():
    def profile(feeds, **_):
        rest = NodeTime(name=OUTSIDE_NODES, type="", ms=0.5)
        return (NodeTime(name="a/MatMul", type="x", ms=float(feeds["n"][0])), rest)

    described = {"inputs": (), "outputs": (), "device": "cpu", "precision": "float32"}
    session = SimpleNamespace(**described, run=lambda feeds, **_: {}, profile=profile)
    recording = RecordingSession(session)
    for number in (1.0, 2.0, 4.0):
        recording.run({"n": np.array([number])})
    assert recording.profile_recorded() == (
        NodeTime(name="a/MatMul", type="x", ms=7.0),
        NodeTime(name=OUTSIDE_NODES, type="", ms=1.5),
    )
