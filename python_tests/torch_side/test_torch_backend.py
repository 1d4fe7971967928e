"""Backend torch: how graphs run, which kernels and precision they take, what a capture needs."""

import threading
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch.backends import cuda, cudnn

from support.errors import refused
from support.fake_gpu import FakeRun
from support.graphs import write_graph
from zsseg_rt.backends import _torch
from zsseg_rt.backends._torch import BACKEND, TorchRecorder
from zsseg_rt.backends._torch_program import (
    Program,
    exact_float32,
    no_cudnn_attention,
    stored_precision,
)
from zsseg_rt.backends.base import BackendOptions, RecordingSession
from zsseg_rt.errors import BackendError, CheckpointError, PrecisionNotApplied
from zsseg_rt.networks.layers import Block, residual_block
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.network import weight_of
from zsseg_rt.onnx.on_torch import OnTorch
from zsseg_rt.onnx.operations import Linear, Norm
from zsseg_rt.onnx.reader import map_file, read_network
from zsseg_rt.onnx.writer import save_onnx, with_exact_halves

STORED = Path(__file__).parents[1] / "bundles" / "v1"
GRAPHS = sorted({path.name: path for path in STORED.glob("*/*.onnx")}.values())  # one of a name
GRAPH = STORED / "descriptor.zsseg" / "decoder.float32.onnx"
WIDTH, HEADS, BLOCKS, TOKENS = 32, 4, 3, 9
# What a block asks of a GPU in float16: 4 products and 6 sums, two norms, the activation's three,
# attention; and casts around norms, rows of heads side by side.
MOST_LAUNCHES = {"float32": 26, "float16": 32}


def blocks(ops, x, mask):
    """Some residual blocks of random weights."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return (rng.standard_normal(shape) / WIDTH**0.5).astype(np.float32)

    for index in range(BLOCKS):
        square = [Linear(floats(WIDTH, WIDTH), floats(WIDTH)) for _ in range(4)]
        norms = [Norm(1 + floats(WIDTH), floats(WIDTH)) for _ in range(2)]
        wide = Linear(floats(2 * WIDTH, WIDTH), floats(2 * WIDTH))
        narrow = Linear(floats(WIDTH, 2 * WIDTH), floats(WIDTH))
        block = Block(norms[0], *square, norms[1], wide, narrow, HEADS, "quick_gelu")
        with ops.at(f"blocks.{index}"):
            x = residual_block(ops, x, block, mask)
    return x


MASKS = [
    None,
    np.triu(np.full((TOKENS, TOKENS), -9, np.float32), 1),  # of tokens
    np.where(np.arange(TOKENS) < 5, 0, -9).astype(np.float32)[None, None, None],  # of keys
]


@pytest.fixture(params=MASKS, ids=["none", "of tokens", "of keys"])
def mask(request):
    return request.param


def network(mask, precision="float32"):
    graph = Graph()
    graph.output("y", blocks(graph, graph.input("x", (1, TOKENS, WIDTH)), mask))
    return graph.network() if precision == "float32" else to_half(graph.network(), precision)


X = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_fused_attention_computes_the_same(tmp_path, mask, precision):
    save_onnx(with_exact_halves(network(mask, precision)), "g", tmp_path / "g.onnx")
    read = read_network(map_file(tmp_path / "g.onnx"))
    plain, fused = Program(read), Program(read)
    assert stored_precision(read) == precision
    assert fused.fuse_attention() == BLOCKS
    assert [node.kind for node in fused.nodes].count("FusedAttention") == BLOCKS
    assert "Softmax" not in {node.kind for node in fused.nodes}
    expected = blocks(Arrays(), X, mask)
    for program in (plain, fused):
        program.place(torch.device("cpu"))
        (result,) = program.run({"x": torch.from_numpy(X)}).values()
        tolerance = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-5}[precision]
        np.testing.assert_allclose(result, expected, atol=tolerance)


def test_networks_run_on_tensors(mask):
    """So a module of torch may run a network's definition; weights may be NumPy's."""
    rows = blocks(Arrays(xp=OnTorch(torch)), torch.from_numpy(X), mask)
    np.testing.assert_allclose(rows, blocks(Arrays(), X, mask), atol=1e-5)


@pytest.mark.parametrize("precision", MOST_LAUNCHES)
def test_a_block_stays_within_its_launches(tmp_path, mask, precision):
    save_onnx(network(mask, precision), "g", tmp_path / "g.onnx")
    run = FakeRun(tmp_path / "g.onnx")
    assert run.fused_attention == run.num_fused == BLOCKS
    assert run.crossed == []
    assert len(run.launched) <= BLOCKS * MOST_LAUNCHES[precision] + 2
    assert len(run.launched) < len(FakeRun(tmp_path / "g.onnx", fused=False).launched)


@pytest.mark.parametrize("change", ["an output", "another scope", "read twice"])
def test_an_attention_that_is_not_alone_stays_as_it_is(change):
    graph = Graph()
    q = graph.input("q", (1, 2, 4, 8))
    with graph.at("other" if change == "another scope" else "attention"):
        weights = graph.softmax(graph.matmul(q, graph.transpose(q, (0, 1, 3, 2))))
        graph.output("y", graph.matmul(weights, q))
    if change == "an output":
        graph.output("weights", weights)
    elif change == "read twice":
        graph.output("z", graph.exp(weights))
    assert Program(graph.network()).fuse_attention() == 0


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_a_run_reads_nothing_back_and_sends_nothing(path):
    """Reading a value of a fake tensor is an error, so that a run can be captured."""
    run = FakeRun(path)
    assert run.launched
    assert run.crossed == []


def test_an_operator_that_torch_does_not_run_is_refused():
    graph = Graph()
    scale = np.ones((), np.float32), np.zeros((), np.int8)
    quantised = graph.apply("QuantizeLinear", (graph.input("x", (1, 4, 8, 8)), *scale))
    graph.output("y", graph.apply("DequantizeLinear", (quantised, *scale)))
    with refused(BackendError, "g.onnx", "QuantizeLinear"):
        Program(graph.network(), "g.onnx")


def test_in_half_sizes_stay_and_weights_beyond_float16_are_refused(tmp_path):
    graph, options = Graph(), {"device": "cpu", "options": BackendOptions()}
    scales = graph.apply("Constant", (), value=weight_of(np.float32([1, 1, 4 / 3, 1])))
    x = graph.mul(graph.input("x", (1, 1, 384, 1)), np.full((1, 1), 1e6, np.float32))
    graph.output("y", graph.apply("Resize", (x, np.zeros(0, np.float32), scales), mode=b"nearest"))
    with refused(CheckpointError, None, "65504"):
        to_half(graph.network())
    save_onnx(graph.network(), "g", tmp_path / "g.onnx")
    with refused(PrecisionNotApplied, "precision", "'float32'", "'bfloat16'"):
        BACKEND.load(tmp_path / "g.onnx", precision="float16", **options)
    session = BACKEND.load(tmp_path / "g.onnx", precision="bfloat16", **options).session()
    result = session.run({"x": np.ones((1, 1, 384, 1), np.float32)})["y"]
    assert result.shape == (1, 1, 512, 1)  # 384 times 4/3 of bfloat16 is 513


# --- single operators, on a GPU that is not there -------------------------------------------------


def write_one(path, node, constants, kind=TensorProto.FLOAT, rank=2):
    """A graph of one node: x [6, 8] and constants to y."""
    axes = [f"axis{axis}" for axis in range(rank)]
    return write_graph(path, [node], {"x": (kind, [6, 8])}, {"y": (kind, axes)}, constants)


def computed(path, x):
    """A graph's result for x, on the host."""
    program = Program(read_network(map_file(path)))
    program.place(torch.device("cpu"))
    (result,) = program.run({"x": torch.from_numpy(x)}).values()
    return result.numpy()


PLACES = np.arange(48, dtype=np.float32).reshape(6, 8)


def slice_of(start, end, step):
    return {"starts": [start], "ends": [end], "axes": [-1], "steps": [step]}


@pytest.mark.parametrize(
    ("op_type", "constants", "launched"),
    [
        ("Slice", slice_of(-3, 2**63 - 1, 1), []),
        ("Slice", slice_of(0, 8, 3), []),
        ("Slice", slice_of(6, 1, -2), ["aten.flip.default"]),
        ("Gather", {"i": -1}, []),
        ("Gather", {"i": [3, 4, 5]}, []),
        ("Gather", {"i": [-2, -1]}, []),
        ("Gather", {"i": [-1, 0]}, ["aten.index_select.default"]),
        ("Gather", {"i": [[0, 2]]}, ["aten.index_select.default"]),
        ("Clip", {"low": np.float32(3.5)}, ["aten.clamp.default"]),
    ],
)
def test_constants_are_not_read_back_and_choose_views(tmp_path, op_type, constants, launched):
    node = helper.make_node(op_type, ["x", *constants], ["y"])
    constants = {name: np.asarray(value) for name, value in constants.items()}
    rank = 1 + constants["i"].ndim if op_type == "Gather" else 2
    path = write_one(tmp_path / "g.onnx", node, constants, rank=rank)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": PLACES})
    np.testing.assert_array_equal(computed(path, PLACES), expected)
    run = FakeRun(path)
    assert (run.crossed, run.launched[-1:]) == ([], launched)


@pytest.mark.parametrize("op_type", ["LayerNormalization", "Softmax"])
def test_norms_of_half_precision_are_one_kernel(tmp_path, op_type):
    """It computes in float32 inside: the sums here are beyond float16."""
    constants = {"scale": np.ones(8, np.float16), "bias": np.zeros(8, np.float16)}
    names = list(constants) if op_type == "LayerNormalization" else []
    node = helper.make_node(op_type, ["x", *names], ["y"])
    weights = {name: constants[name] for name in names}
    path = write_one(tmp_path / "norm.onnx", node, weights, TensorProto.FLOAT16)
    launched = FakeRun(path).launched
    assert [name for name in launched if "_to_copy" not in name] == launched[:1]
    assert len(launched) <= 2  # and the widening of the graph's output
    x = (60000 * np.sin(PLACES)).astype(np.float16)
    wide = x.astype(np.float64)
    if op_type == "Softmax":
        expected = np.exp(wide - wide.max(1, keepdims=True))
        expected /= expected.sum(1, keepdims=True)
    else:
        expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(computed(path, x), expected, atol=2e-3)  # float16 rounds the result


def test_results_name_the_stream_that_wrote_them():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    result = _torch.DeviceResult(tensor, 77)
    assert result.__cuda_array_interface__["stream"] == 77
    assert _torch.DeviceResult(tensor, 0).__cuda_array_interface__["stream"] == 1
    view = result.view((1, 4))
    assert view.shape == view.__cuda_array_interface__["shape"] == (1, 4)
    assert view.__cuda_array_interface__["data"] == result.__cuda_array_interface__["data"]
    assert not hasattr(result, "__dlpack__")


# --- settings of the process while a graph runs on a GPU ---


HAS_NEWER = hasattr(cuda.matmul, "fp32_precision")


def computes_in_tf32():
    if HAS_NEWER:
        places = {"products": cuda.matmul, "convolutions": cudnn.conv}
        return {name: place.fp32_precision == "tf32" for name, place in places.items()}
    return {"products": cuda.matmul.allow_tf32, "convolutions": cudnn.allow_tf32}


@pytest.fixture
def tf32_as_before():
    before = computes_in_tf32()
    yield
    if HAS_NEWER:
        torch.backends.fp32_precision = cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    cuda.matmul.allow_tf32, cudnn.allow_tf32 = False, True
    if HAS_NEWER:
        cuda.matmul.fp32_precision = "none"
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    assert computes_in_tf32() == before


@pytest.mark.usefixtures("tf32_as_before")
@pytest.mark.parametrize(
    "settings",
    [
        [],
        [(cuda.matmul, "allow_tf32", True)],
        [(cudnn, "allow_tf32", False)],
        [(torch.backends, "fp32_precision", "tf32")],
        [(cudnn, "fp32_precision", "tf32"), (cuda.matmul, "allow_tf32", True)],
        [(torch.backends, "fp32_precision", "tf32"), (cuda.matmul, "allow_tf32", False)],
    ],
)
def test_tf32_is_off_inside_and_as_before_behind(settings):
    if not HAS_NEWER and any(name == "fp32_precision" for _, name, _ in settings):
        pytest.skip("needs torch 2.9's settings")
    for setting in settings:
        setattr(*setting)
    before, above = computes_in_tf32(), torch.backends
    inherits = HAS_NEWER and cuda.matmul.fp32_precision == above.fp32_precision
    with exact_float32():
        assert computes_in_tf32() == {"products": False, "convolutions": False}
    assert computes_in_tf32() == before
    if inherits:
        above.fp32_precision = "ieee"
        assert cuda.matmul.fp32_precision == "ieee"


@pytest.mark.usefixtures("tf32_as_before")
@pytest.mark.parametrize("setting", [exact_float32, no_cudnn_attention], ids=["tf32", "cudnn"])
def test_the_last_of_several_threads_gives_a_setting_back(setting):
    torch.set_float32_matmul_precision("medium")
    asks = {exact_float32: lambda: cuda.matmul.allow_tf32}
    ask = asks.get(setting, cuda.cudnn_sdp_enabled)
    second_is_in, first_is_out = threading.Event(), threading.Event()
    states = [ask()]

    def second():
        with setting():
            second_is_in.set()
            first_is_out.wait(10)
            states.append(ask())

    other = threading.Thread(target=second)
    with setting():
        other.start()
        assert second_is_in.wait(10)
    first_is_out.set()
    other.join(10)
    assert [*states, ask()] == [True, False, True]
    assert torch.get_float32_matmul_precision() == "medium"


# --- what a capture of torch's launches needs, with a torch whose CUDA is made up -----------------


@pytest.fixture
def pools(monkeypatch):
    """torch's memory pools: those alive, and those and the devices that are in use."""
    state = SimpleNamespace(alive=weakref.WeakSet(), used=[], devices=[])

    class MemPool:
        def __init__(self):
            assert state.devices, "a pool belongs to the device that is current"
            state.alive.add(self)

    @contextmanager
    def within(stack, value, *_):
        stack.append(value)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cuda, "MemPool", MemPool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", partial(within, state.used))
    monkeypatch.setattr(torch.cuda, "device", partial(within, state.devices))
    return state


def test_what_is_allocated_in_a_capture_comes_from_its_pool_until_it_is_closed(pools):
    recorder, other = TorchRecorder("cuda:1"), TorchRecorder("cuda:0")
    with recorder.recording():
        assert pools.devices == ["cuda:1"]
        (pool,) = pools.used
    with pytest.raises(KeyError), recorder.recording():
        raise KeyError
    assert pools.used == pools.devices == []
    with recorder.recording():  # a second try of the same capture
        assert pools.used == [pool]
    with other.recording():
        assert pools.used != [pool]
    del pool
    recorder.close()
    recorder.close()
    assert len(pools.alive) == 1


def test_on_the_cpu_graphs_stay_as_they_are_written_and_need_no_recorder():
    graph = BACKEND.load(GRAPH, device="cpu", precision="auto", options=BackendOptions())
    assert graph.report == {"fused_attention": 0}
    session = graph.session()
    assert session.recorder() is None
    assert session.capture_state() is None
    assert RecordingSession(session).recorder() is None


def test_on_a_gpu_attention_is_fused_and_each_capture_has_a_recorder(tmp_path, monkeypatch):
    """Device "meta" stands for the GPU."""
    monkeypatch.setattr(_torch, "check_device", lambda torch, device: torch.device("meta"))
    name = "_cuda_beginAllocateCurrentThreadToPool"
    monkeypatch.setattr(torch.cuda.memory, name, print, raising=False)
    save_onnx(network(None, "float16"), "g", tmp_path / "g.onnx")
    graph = BACKEND.load(
        tmp_path / "g.onnx", device="cuda:0", precision="auto", options=BackendOptions()
    )
    assert (graph.report["fused_attention"], graph.precision) == (BLOCKS, "float16")
    session = graph.session()
    first, second = session.recorder(), session.recorder()
    assert isinstance(first, TorchRecorder)
    assert first is not second
    assert session.capture_state() is not None  # and it is the same at every frame
    assert session.capture_state() == session.capture_state()
    monkeypatch.delattr(torch.cuda.memory, name)  # older torch: pools take other threads' tensors
    assert graph.session().capture_state() is None
