"""Real TensorRT-RTX builds of ZegCLIP's graphs at their real sizes, for three GPUs, without one."""

from dataclasses import replace

import pytest

from support.errors import refused
from support.rtx_plans import build_plan, fused_kernels
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.errors import BackendError, PrecisionNotApplied
from zsseg_rt.export.graph_files import GRAPH_PRECISIONS

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytestmark = pytest.mark.usefixtures("rtx")
# Blocks that attend, and how many of them one fused kernel serves: RTX 1.7 has none for float32
ATTENTION_BLOCKS = {"image_encoder": 3, "decoder": 2}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    from zsseg_rt.export import export_graphs
    from zsseg_rt.models.descriptor.model import ZegCLIP, ZegCLIPConfig

    folder = tmp_path_factory.mktemp("graphs")
    torch.manual_seed(0)
    blocks = ATTENTION_BLOCKS["image_encoder"]  # of 12, which are alike
    encoder = replace(ZegCLIPConfig().image_encoder, num_layers=blocks, num_deep_prompts=blocks - 1)
    model = ZegCLIP(ZegCLIPConfig(image_encoder=encoder)).eval()
    export_graphs(model, folder, precisions=GRAPH_PRECISIONS)
    yield folder
    for path in folder.glob("*.onnx"):  # 200 MB
        path.unlink()


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        *((precision, "8.9") for precision in GRAPH_PRECISIONS),
        ("float16", "8.6"),
        ("float16", "12.0"),
    ],
)
@pytest.mark.parametrize("name", ATTENTION_BLOCKS)
def test_graph_builds_in_its_precision_with_attention_fused(graphs, name, precision, target):
    path = graphs / f"{name}.{precision}.onnx"
    plan = build_plan(path, precision, compute_capability=target)
    report = plan.report
    halves = FAMILIES["descriptor"].half_tensors if precision == "float16" else ()
    for spec in report["inputs"] + report["outputs"]:
        assert spec["dtype"] == ("float16" if spec["name"] in halves else "float32"), spec
    dynamic = {s["name"] for s in report["inputs"] + report["outputs"] if "classes" in s["shape"]}
    assert dynamic == ({"queries", "class_embeds"} if name == "decoder" else set())
    assert len(plan.data) > path.stat().st_size * 0.9  # the weights are inside, at their width
    if not report["runtime"].startswith("tensorrt_rtx-1.7."):
        pytest.skip(f"fused kernels' names are known for RTX 1.7, not for {report['runtime']}")
    blocks = ATTENTION_BLOCKS[name] if precision != "float32" else 0
    assert fused_kernels(plan) == (blocks, blocks)


@pytest.fixture(scope="module")
def cat_seg_graphs(tmp_path_factory):
    from support.golden_cat_seg import tiny_model
    from zsseg_rt.export import export_graphs

    folder = tmp_path_factory.mktemp("cat_seg")
    export_graphs(tiny_model(most_classes=8), folder, precisions=("float16",))
    return folder


@pytest.mark.parametrize("name", ["image_encoder", "head", "head_3"])
def test_cat_seg_graph_builds_in_its_precision(cat_seg_graphs, name):
    path = cat_seg_graphs / f"{name}.float16.onnx"
    report = build_plan(path, "float16", dynamic_axes={"classes": (1, 8, 8)}).report
    assert report["axes"].get("classes") == (None if name == "image_encoder" else [1, 8, 8])


def test_weights_in_half_the_bytes_are_no_float16_graph(tmp_path):
    import onnx

    from support import tiny
    from zsseg_rt.export import export_graphs

    model = tiny.zegclip_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    export_graphs(model, tmp_path, precisions=("float32",))
    path = tmp_path / "image_encoder.float32.onnx"
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds >= {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}
    build_plan(path, "float32")


def test_a_precision_the_graph_does_not_hold_is_refused(graphs):
    for stored, asked in (("float32", "float16"), ("float16", "int8"), ("float32", "bfloat16")):
        with refused(PrecisionNotApplied, "precision", asked, f"decoder.{stored}.onnx"):
            BACKEND.build_plan(graphs / f"decoder.{stored}.onnx", precision=asked)


def test_a_gpu_that_cannot_be_targeted_or_lacks_bfloat16_is_refused(graphs):
    with refused(PrecisionNotApplied, "precision", "8.0", "bfloat16", "7.5"):
        build_plan(graphs / "decoder.bfloat16.onnx", "bfloat16", compute_capability="7.5")
    for target in ("8.7", "9.0", "10.0", "11.0", "sm86", ""):
        with refused(BackendError, "compute_capability", "7.5", "8.0", "8.6", "8.9", "12.0"):
            build_plan(graphs / "decoder.float16.onnx", "float16", compute_capability=target)
