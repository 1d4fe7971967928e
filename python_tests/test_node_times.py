"""Nodes of exported graphs are named after modules, and timed by every backend."""

import json
import sys

import numpy as np
import onnx
import pytest

from support.fake_tensorrt import FakeNative, FakeTensorRT, GpuArray
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.backends import _tensorrt, _tensorrt_device
from zsseg_rt.backends.base import BackendOptions, NodeTime
from zsseg_rt.backends.recording import RecordingSession
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundle import Bundle
from zsseg_rt.errors import BackendError, ConfigError

COUNTING = BackendOptions(num_threads=1, node_times=True)


@pytest.fixture(scope="module")
def encoder(zegclip_bundle):
    bundle = Bundle.load(zegclip_bundle)
    return bundle.path / bundle.graph("image_encoder", "float32").file


@pytest.fixture
def image(encoder):
    def make(session):
        (spec,) = session.inputs
        shape = tuple(int(size) for size in spec.shape)
        return {spec.name: np.random.default_rng(0).random(shape, np.float32)}

    return make


def test_exported_nodes_are_named_after_their_modules(encoder):
    nodes = onnx.load(encoder).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert "blocks.3.mlp.c_fc/MatMul" in names
    assert "blocks.0/attention/Softmax" in names
    assert "conv1/Conv" in names
    of_blocks = [name for name in names if name.startswith("blocks.")]
    assert len(of_blocks) / len(names) > 0.8
    assert not any(node.metadata_props or node.doc_string for node in nodes)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_nodes_are_timed_under_the_graph_s_names(encoder, image, backend):
    graph = get_backend(backend).load(encoder, device="cpu", precision="float32", options=COUNTING)
    session = graph.session()
    feeds = image(session)
    before = {name: np.array(array) for name, array in session.run(feeds).items()}
    nodes = session.profile(feeds, runs=5)
    known = {node.name for node in onnx.load(encoder).graph.node}
    assert {node.name for node in nodes} - {""} <= known
    assert sum(node.ms for node in nodes) > 0.0
    assert all(node.ms >= 0.0 for node in nodes)
    modules = {node.name.partition("/")[0] for node in nodes}
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert {f"blocks.{index}.{part}" for index in range(4) for part in parts} <= modules
    for name, array in session.run(feeds).items():
        np.testing.assert_array_equal(array, before[name])
    session.close()


def test_openvino_times_no_nodes_unless_it_was_asked_to(encoder, image):
    options = BackendOptions(num_threads=1)
    graph = get_backend("openvino").load(
        encoder, device="cpu", precision="float32", options=options
    )
    session = graph.session()
    with pytest.raises(BackendError, match="node_times=True"):
        session.profile(image(session))


def test_tensorrt_times_layers_in_a_context_of_their_own(tmp_path, monkeypatch):
    fake, native = FakeTensorRT(), FakeNative()
    monkeypatch.delenv("ZSSEG_TENSORRT", raising=False)
    monkeypatch.setattr(_tensorrt, "check_graph", lambda path: None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    monkeypatch.setattr(_tensorrt_device, "native", lambda: native)
    path = tmp_path / "decoder.onnx"
    path.write_text(
        json.dumps(
            {
                "inputs": [{"name": "x", "dtype": "FLOAT", "shape": [1, 4], "axes": {}}],
                "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [1, 4]}],
                "layers": [["MATRIX_MULTIPLY", "HALF"]],
            }
        )
    )
    graph = get_backend("tensorrt").load(
        path, device="cuda:0", precision="auto", options=BackendOptions()
    )
    session = graph.session()
    feeds = {"x": GpuArray(np.zeros((1, 4), np.float32), 0x1000)}
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
        width = engine.bundle.text.embed_dim
        embeddings = np.eye(3, width, dtype=np.float32)
        engine.set_classes(["a", "b", "c"], embeddings=embeddings)
        labels = engine.segment(frame).labels
        found = engine.node_times(frame, runs=2)
        assert set(found) == {name for name in engine.bundle.graphs if name != "text_encoder"}
        assert all(nodes for nodes in found.values())
        np.testing.assert_array_equal(engine.segment(frame).labels, labels)


def test_an_engine_that_does_not_count_says_so(colour_bundle):
    with (
        Engine(colour_bundle, EngineConfig(device="cpu")) as engine,
        pytest.raises(ConfigError, match="with_node_times=True"),
    ):
        engine.node_times(np.zeros((8, 8, 3), np.uint8))


def test_a_graph_that_runs_often_counts_as_often():
    class Session:
        def run(self, feeds, *, stream=0):
            return {}

        def profile(self, feeds, *, stream=0, runs=10):
            return (NodeTime(name="a/MatMul", type="x", ms=float(feeds["n"][0])),)

    recording = RecordingSession(Session())
    for number in (1.0, 2.0, 4.0):
        recording.run({"n": np.array([number])})
    assert recording.profile_recorded() == (NodeTime(name="a/MatMul", type="x", ms=7.0),)
