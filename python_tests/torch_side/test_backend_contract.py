"""One contract for every backend that can run here."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from support.errors import refused
from support.graphs import FLOAT, write_graph, write_two_inputs
from zsseg_rt import ops
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend, is_installed
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BackendError, DeviceError, DTypeError, PrecisionNotApplied, ShapeError

PLACES = [("openvino", "cpu"), ("torch", "cpu"), ("torch", "cuda:0"), ("tensorrt", "cuda:0")]
OPTIONS = BackendOptions(num_threads=1, dynamic_axes={"classes": (1, 4, 16)})


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: "-".join(place))
def place(request):
    """A backend and a device; skipped where either is absent."""
    name, device = request.param
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    if device != "cpu" and ops.cuda_device_count() == 0:
        pytest.skip("no CUDA device")
    return get_backend(name), device


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_two_inputs(tmp_path_factory.mktemp("graphs") / "two.onnx")


@pytest.fixture
def load(place):
    backend, device = place

    def load_graph(path, precision="float32", device=device, options=OPTIONS):
        return backend.load(path, device=device, precision=precision, options=options)

    return load_graph


@pytest.fixture
def compiled(load, graph):
    compiled = load(graph, options=replace(OPTIONS, num_sessions=2))
    yield compiled
    compiled.close()


@pytest.fixture
def session(compiled):
    session = compiled.session()
    yield session
    session.close()


@pytest.fixture
def put(place):
    """Move a NumPy array to the session's device."""
    return lambda array: array if place[1] == "cpu" else ops.DeviceArray.from_numpy(array, 0, 0)


def fetch(array) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    return array.cpu().numpy() if hasattr(array, "cpu") else array.numpy()


def feeds(num_classes=5):
    rng = np.random.default_rng(num_classes)
    return {
        "a": rng.standard_normal((1, num_classes, 4)).astype(np.float32),
        "b": rng.standard_normal((1, 3, 4)).astype(np.float32),
    }


def test_specs(session, place):
    assert session.inputs == (
        TensorSpec(name="a", dtype="float32", shape=(1, "classes", 4)),
        TensorSpec(name="b", dtype="float32", shape=(1, 3, 4)),
    )
    assert session.outputs == (
        TensorSpec(name="scores", dtype="float32", shape=(1, "classes", 3)),
        TensorSpec(name="doubled", dtype="float32", shape=(1, 3, 4)),
    )
    assert (session.device, session.precision) == (place[1], "float32")


@pytest.mark.parametrize("num_classes", [1, 5, 16, 2, 7])
def test_dynamic_axis(session, put, num_classes):
    inputs = feeds(num_classes)
    out = session.run({name: put(array) for name, array in inputs.items()})
    assert list(out) == ["scores", "doubled"]
    expected = inputs["a"] @ inputs["b"].transpose(0, 2, 1)
    np.testing.assert_allclose(fetch(out["scores"]), expected, atol=1e-5)
    np.testing.assert_array_equal(fetch(out["doubled"]), 2 * inputs["b"])


def test_runs_do_not_remember_and_leave_feeds_as_they_are(session, put):
    inputs = feeds(3)
    for array in inputs.values():
        array.setflags(write=False)
    placed = {name: put(array) for name, array in inputs.items()}
    first = fetch(session.run(placed)["scores"]).copy()
    session.run({name: put(array) for name, array in feeds(16).items()})
    np.testing.assert_array_equal(fetch(session.run(placed)["scores"]), first)
    for name, array in feeds(3).items():
        np.testing.assert_array_equal(fetch(placed[name]), array)


WRONG_SHAPES = [(1, 0, 4), (1, 17, 4), (1, 5, 3), (5, 4), (2, 5, 4), (1, 5, 4, 1)]
WRONG_FEEDS = {
    "missing": (ShapeError, "feeds", lambda a: {"a": a}),
    "unknown": (ShapeError, "feeds", lambda a: {**feeds(), "c": a}),
    "no array": (DTypeError, "a", lambda a: {**feeds(), "a": [[1.0]]}),
    "not contiguous": (ShapeError, "a", lambda a: {**feeds(), "a": a.repeat(2, 2)[:, :, ::2]}),
    **{
        str(shape): (ShapeError, "a", lambda a, n=shape: {**feeds(), "a": np.zeros(n, np.float32)})
        for shape in WRONG_SHAPES
    },
    **{
        kind: (DTypeError, "a", lambda a, kind=kind: {**feeds(), "a": a.astype(kind)})
        for kind in ("float64", "float16", "int32", "uint8")
    },
}


@pytest.mark.parametrize("kind", WRONG_FEEDS)
def test_wrong_feeds(session, put, kind):
    if session.device != "cpu" and kind in ("not contiguous", "(1, 0, 4)"):
        pytest.skip("an empty array has no device memory; strides are the array boundary's")
    error, argument, change = WRONG_FEEDS[kind]
    wrong = {k: put(v) if isinstance(v, np.ndarray) else v for k, v in change(feeds()["a"]).items()}
    with refused(error, argument):
        session.run(wrong)


def test_two_sessions_of_one_graph_in_two_threads(compiled, put):
    """They share the weights and nothing else: every result is that of its own feeds."""
    assert (compiled.device, compiled.precision) == (compiled.session().device, "float32")

    def run(session, num_classes):
        inputs = feeds(num_classes)
        placed = {name: put(array) for name, array in inputs.items()}
        expected = inputs["a"] @ inputs["b"].transpose(0, 2, 1)
        for _ in range(50):
            scores = fetch(session.run(placed)["scores"])
            np.testing.assert_allclose(scores, expected, atol=1e-5)
        return num_classes

    sessions = [compiled.session(), compiled.session()]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, sessions, [3, 16])) == [3, 16]
    sessions[0].close()
    assert run(sessions[1], 5) == 5


def test_closed_graphs_and_sessions_say_so(compiled, put):
    session = compiled.session()
    for each in (session, session, compiled, compiled):
        each.close()
    with refused(BackendError, "session"):
        session.run({k: put(v) for k, v in feeds().items()})
    with refused(BackendError, "graph"):
        compiled.session()


def test_unknown_devices_and_precisions_are_refused(load, graph):
    for device in ("tpu", "cuda", "cuda:99", "cpu:0"):
        with refused(DeviceError, "device"):
            load(graph, device=device)
    for precision in ("int3", "fp8"):
        with refused(PrecisionNotApplied, "precision"):
            load(graph, precision=precision)


@pytest.mark.parametrize("content", [None, b"", b"not a graph", b"\x3a\xff\xff\xff\x7f", 0.5, 0.95])
def test_corrupt_file(load, graph, tmp_path, content):
    """Also an absent one, and a share of a sound one."""
    path = tmp_path / "bad.onnx"
    if isinstance(content, float):
        content = graph.read_bytes()[: int(graph.stat().st_size * content)]
    if content is not None:
        path.write_bytes(content)
    with refused(BackendError, None, "bad.onnx"):
        load(path)


def test_unknown_operator(load, tmp_path):
    odd, ends = helper.make_node("Levitate", ["x"], ["y"], domain="org.example"), (FLOAT, [1])
    path = write_graph(tmp_path / "odd.onnx", [odd], {"x": ends}, {"y": ends})
    with pytest.raises(BackendError, match="Levitate"):
        load(path)
