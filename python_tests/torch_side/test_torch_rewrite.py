"""What backend torch makes of graphs for a GPU computes the same, in few launches."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from conftest import require_cuda  # noqa: E402
from support import tiny  # noqa: E402
from support.exported_graphs import export_descriptor_graphs  # noqa: E402
from support.fake_gpu import FakeRun  # noqa: E402
from zsseg_rt import ops  # noqa: E402
from zsseg_rt.backends import _torch  # noqa: E402
from zsseg_rt.backends._torch_graph import fused_operators  # noqa: E402
from zsseg_rt.backends._torch_graph.arrays import add_norm_rows  # noqa: E402
from zsseg_rt.backends._torch_graph.program import Program  # noqa: E402
from zsseg_rt.backends.base import BackendOptions  # noqa: E402
from zsseg_rt.ops import reference  # noqa: E402

STORED = Path(__file__).parents[1] / "bundles" / "v1"
GRAPHS = sorted(STORED.glob("*/*.onnx"))
# Rewritten, values are rounded elsewhere: some units of the last place, relative to the largest.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
NUM_BLOCKS, NUM_PROMPTS = 12, 10  # as in ViT-B/16; widths do not change how much is launched
FEW_BLOCKS = 2
MOST_LAUNCHES = {"zegclip": 115, "clip_rc": 158, "segment_tokens": 117}


@pytest.fixture(scope="module")
def zegclip(tmp_path_factory):
    sizes = tiny.TinySizes(num_layers=NUM_BLOCKS, num_prompts=NUM_PROMPTS)
    return export_descriptor_graphs(tiny.zegclip_model(sizes), tmp_path_factory.mktemp("zegclip"))


@pytest.fixture(scope="module")
def clip_rc(tmp_path_factory):
    sizes = tiny.TinySizes(num_layers=FEW_BLOCKS, num_prompts=NUM_PROMPTS, decoder_layers=2)
    return export_descriptor_graphs(tiny.clip_rc_model(sizes), tmp_path_factory.mktemp("clip_rc"))


def feeds_of(path, dynamic=5):
    """Random values for a graph's inputs."""
    rng = np.random.default_rng(0)
    shapes = {
        value.name: [axis.dim_value or dynamic for axis in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    }
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def results_of(path, *, rewritten, lowered=None):
    program = Program.read(path)
    if rewritten:
        program.rewrite()
    with torch.inference_mode():
        program.place(torch.device("cpu"), lowered)
        return program.run(feeds_of(path))


def assert_agreement(path, lowered=None):
    """Values agree; group maps are indices of the best, which may change where two are as good."""
    dtype = lowered or (torch.float16 if "float16" in path.name else torch.float32)
    plain = results_of(path, rewritten=False, lowered=lowered)
    for name, result in results_of(path, rewritten=True, lowered=lowered).items():
        assert result.shape == plain[name].shape
        assert result.isfinite().all()
        error = (result - plain[name]).abs().max() / plain[name].abs().max()
        assert error <= TOLERANCES[dtype] or (name == "group_map" and lowered is not None), name


@pytest.mark.parametrize("lowered", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_stored_graphs_compute_the_same(path, lowered):
    """ZegCLIP, ZegFormer, ZeroSeg and a dense encoder."""
    if lowered is not None and "float16" in path.name:
        lowered = None
    assert_agreement(path, lowered)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", ["image_encoder", "decoder"])
def test_clip_rc_computes_the_same(clip_rc, name, precision):
    assert_agreement(clip_rc[f"{name}.{precision}"])


def test_a_clip_rc_frame_stays_within_its_launches(tmp_path):
    sizes = tiny.TinySizes(num_layers=NUM_BLOCKS, num_prompts=NUM_PROMPTS)
    graphs = export_descriptor_graphs(tiny.clip_rc_model(sizes), tmp_path)
    runs = [FakeRun(graphs[f"{name}.float16"]) for name in ("image_encoder", "decoder")]
    assert [run.fused_attention for run in runs] == [NUM_BLOCKS, 6]
    assert sum(len(run.launched) for run in runs) <= MOST_LAUNCHES["clip_rc"]


def test_a_zeroseg_frame_stays_within_its_launches():
    run = FakeRun(STORED / "segment_tokens.zsseg" / "image_encoder.float32.onnx")
    assert len(run.launched) <= MOST_LAUNCHES["segment_tokens"]


def test_every_block_of_clip_rc_is_fused_with_its_mask(clip_rc):
    run = FakeRun(clip_rc["image_encoder.float16"])
    assert run.report["fused_attention"] == run.fused_attention == FEW_BLOCKS
    assert run.crossed == []
    assert "aten._softmax.default" not in run.launched
    decoder = FakeRun(clip_rc["decoder.float16"])
    assert decoder.report["fused_attention"] == decoder.fused_attention == 4  # two ways, two layers


def test_a_zegclip_frame_stays_within_its_launches(zegclip):
    runs = [FakeRun(zegclip[f"{name}.float16"]) for name in ("image_encoder", "decoder")]
    assert [run.fused_attention for run in runs] == [NUM_BLOCKS, 2]
    assert [run.report["quick_gelu"] for run in runs] == [NUM_BLOCKS, 0]
    assert all(run.crossed == [] for run in runs)
    total = sum((Counter(run.launched) for run in runs), Counter())
    assert total.total() <= MOST_LAUNCHES["zegclip"], total
    assert total["aten.silu.default"] == NUM_BLOCKS
    # one product for queries, keys and values, with prompts behind it; one for their result; two
    # in the MLP
    assert total["aten.addmm.out"] == NUM_BLOCKS
    assert total["aten.addmm.default"] == 3 * NUM_BLOCKS + 1 + 6
    assert total["aten._addmm_activation.default"] == 2
    assert total["aten.clone.default"] == total["aten.mm.default"] == 1  # patches
    assert total["add_layer_norm"] == 1 + 2 * NUM_BLOCKS + 4
    assert total["aten._weight_norm_interface.default"] == 1  # makes embeddings unit
    plain = [
        FakeRun(zegclip[f"{name}.float16"], rewritten=False)
        for name in ("image_encoder", "decoder")
    ]
    assert sum(len(run.launched) for run in plain) > 2 * total.total()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_zegclip_computes_the_same(zegclip, precision):
    assert_agreement(zegclip[f"image_encoder.{precision}"])
    assert_agreement(zegclip[f"decoder.{precision}"])


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_a_run_reads_nothing_back_and_sends_nothing(path):
    """Reading a value of a fake tensor is an error, so that a run can be captured."""
    run = FakeRun(path)
    assert run.launched
    assert run.crossed == []
    assert len(run.launched) <= len(FakeRun(path, rewritten=False).launched)


@pytest.mark.parametrize("lowered", [torch.float16, torch.bfloat16], ids=str)
def test_a_lowered_graph_is_fused_as_well(zegclip, lowered):
    run = FakeRun(zegclip["image_encoder.float32"], lowered=lowered)
    assert run.fused_attention == NUM_BLOCKS
    assert len(run.launched) <= MOST_LAUNCHES["zegclip"]


@pytest.mark.parametrize("half", [0, 1])
def test_rows_that_are_cut_from_wider_ones_are_copied_only_at_the_end(monkeypatch, half):
    given = []
    monkeypatch.setattr(fused_operators, "add_norm_rows", lambda *rows: given.append(rows))
    whole, scale = torch.randn(1, 5, 8), torch.ones(1, 4)
    x, y = whole.split(4, dim=-1)[half], torch.randn(1, 5, 4)
    attributes = {"eps": [1e-5], "with_total": False}
    fused_operators.RUNNABLE["AddNorm"](attributes, x, y, scale, 0 * scale)
    rows = given[0][0]
    torch.testing.assert_close(rows[:, :4], x[0], rtol=0, atol=0)
    assert rows.is_contiguous()
    assert (rows.data_ptr() == x.data_ptr()) == (half == 0)  # else the last row would end too late


def test_on_the_cpu_graphs_stay_as_they_are_written():
    path = STORED / "descriptor.zsseg" / "decoder.float32.onnx"
    graph = _torch.BACKEND.load(path, device="cpu", precision="auto", options=BackendOptions())
    assert graph.report == {}
    assert len(graph.layers()) == len(onnx.load(path).graph.node)


def test_on_a_gpu_the_graphs_report_counts_what_was_fused(monkeypatch):
    """Device "meta" stands for the GPU."""
    monkeypatch.setattr(_torch, "_check_device", lambda torch, device: torch.device("meta"))
    path = STORED / "descriptor.zsseg" / "image_encoder.float16.onnx"
    graph = _torch.BACKEND.load(path, device="cuda:0", precision="auto", options=BackendOptions())
    assert graph.report["fused_attention"] == 1
    assert graph.report["quick_gelu"] == 1
    assert [layer.type for layer in graph.layers()].count("FusedAttention") == 1
    assert graph.precision == "float16"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("with_total", [True, False])
def test_a_sum_and_its_norm_run_where_torchs_tensors_lie(monkeypatch, with_total):
    """Arrays of ours stand for tensors of torch on a GPU, which need not be real."""
    require_cuda()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 12), np.float32).astype(np.float16)
    scale, shift = rng.standard_normal((2, 1, 12), np.float32)
    stream = ops.Stream(0)

    def tensor(host):
        array = ops.DeviceArray.from_numpy(host, 0, stream.handle)
        address = array.__cuda_array_interface__["data"][0]
        shown = SimpleNamespace(shape=host.shape, dtype=f"torch.{host.dtype}", is_cuda=True)
        shown.device, shown.array, shown.data_ptr = "cuda:0", array, lambda: address
        return shown

    current = SimpleNamespace(cuda_stream=stream.handle)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    given = [tensor(held) for held in (x, y, scale, shift)]
    normed, total = tensor(0 * x), tensor(0 * x) if with_total else None
    add_norm_rows(*given, [1e-5], normed, total)
    expected_total = np.empty_like(x)
    expected = reference.add_layer_norm(x, y, scale, shift, eps=[1e-5], total=expected_total)
    found = normed.array.numpy(stream.handle)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # one rounding may differ
    if total is not None:
        np.testing.assert_array_equal(total.array.numpy(stream.handle), expected_total)
