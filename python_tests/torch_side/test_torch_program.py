"""Backend torch runs graphs as they are written, with one kernel for an attention."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.errors import refused  # noqa: E402
from support.fake_gpu import FakeRun  # noqa: E402
from zsseg_rt.backends import _torch  # noqa: E402
from zsseg_rt.backends._torch_program import Program  # noqa: E402
from zsseg_rt.backends.base import BackendOptions  # noqa: E402
from zsseg_rt.errors import BackendError  # noqa: E402
from zsseg_rt.networks.layers import Block, residual_block  # noqa: E402
from zsseg_rt.onnx.arrays import Arrays  # noqa: E402
from zsseg_rt.onnx.graph import Graph  # noqa: E402
from zsseg_rt.onnx.half import to_half  # noqa: E402
from zsseg_rt.onnx.on_torch import OnTorch  # noqa: E402
from zsseg_rt.onnx.operations import Linear, Norm  # noqa: E402
from zsseg_rt.onnx.reader import map_file, read_network  # noqa: E402
from zsseg_rt.onnx.writer import save_onnx, with_exact_halves  # noqa: E402

STORED = Path(__file__).parents[1] / "bundles" / "v1"
GRAPHS = sorted(STORED.glob("*/*.onnx"))
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


MASKS = {
    "none": None,
    "of tokens": np.triu(np.full((TOKENS, TOKENS), -9, np.float32), 1),
    "of keys": np.where(np.arange(TOKENS) < 5, 0, -9).astype(np.float32)[None, None, None],
}


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param]


def network(mask, precision="float32"):
    graph = Graph()
    graph.output("y", blocks(graph, graph.input("x", (1, TOKENS, WIDTH)), mask))
    return graph.network() if precision == "float32" else to_half(graph.network(), precision)


X = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("lowered", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_fused_attention_computes_the_same(tmp_path, mask, precision, lowered):
    save_onnx(with_exact_halves(network(mask, precision)), "g", tmp_path / "g.onnx")
    read = read_network(map_file(tmp_path / "g.onnx"))
    plain, fused = Program(read), Program(read)
    assert plain.precision == precision
    assert fused.fuse_attention() == BLOCKS
    assert [node.kind for node in fused.nodes].count("FusedAttention") == BLOCKS
    assert "Softmax" not in {node.kind for node in fused.nodes}
    expected = blocks(Arrays(), X, mask)
    for program in (plain, fused):
        program.place(torch.device("cpu"), lowered)
        (found,) = program.run({"x": torch.from_numpy(X)}).values()
        kinds = {precision, str(lowered).removeprefix("torch.")}
        tolerance = 0.1 if "bfloat16" in kinds else 0.02 if "float16" in kinds else 1e-5
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_networks_run_on_tensors(mask):
    """So a module of torch may run a network's definition; weights may be NumPy's."""
    found = blocks(Arrays(xp=OnTorch(torch)), torch.from_numpy(X), mask)
    np.testing.assert_allclose(found, blocks(Arrays(), X, mask), atol=1e-5)


@pytest.mark.parametrize("precision", MOST_LAUNCHES)
def test_a_block_stays_within_its_launches(tmp_path, mask, precision):
    save_onnx(network(mask, precision), "g", tmp_path / "g.onnx")
    run = FakeRun(tmp_path / "g.onnx")
    assert run.fused_attention == run.found == BLOCKS
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
    made = graph.apply("LRN", (graph.input("x", (1, 4, 8, 8)),), (1, 4, 8, 8), size=3)
    graph.output("y", made)
    with refused(BackendError, "g.onnx", "LRN"):
        Program(graph.network(), "g.onnx")


def test_on_the_cpu_graphs_stay_as_they_are_written():
    path = STORED / "descriptor.zsseg" / "decoder.float32.onnx"
    graph = _torch.BACKEND.load(path, device="cpu", precision="auto", options=BackendOptions())
    assert graph.report == {}
    computed = [n for n in read_network(map_file(path)).nodes if n.kind != "Constant"]
    assert len(graph.layers()) <= len(computed)


def test_on_a_gpu_the_graphs_report_counts_what_was_fused(tmp_path, monkeypatch):
    """Device "meta" stands for the GPU."""
    monkeypatch.setattr(_torch, "_check_device", lambda torch, device: torch.device("meta"))
    save_onnx(network(None, "float16"), "g", tmp_path / "g.onnx")
    graph = _torch.BACKEND.load(
        tmp_path / "g.onnx", device="cuda:0", precision="auto", options=BackendOptions()
    )
    assert graph.report["fused_attention"] == BLOCKS
    assert [layer.type for layer in graph.layers()].count("FusedAttention") == BLOCKS
    assert graph.precision == "float16"
