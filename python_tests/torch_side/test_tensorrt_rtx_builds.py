"""Real TensorRT-RTX builds of ZegCLIP's graphs at their real sizes, for three GPUs, without one."""

from dataclasses import replace

import pytest

from support.errors import refused
from support.golden_encoders import weight
from support.rtx_plans import fused_kernels
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.errors import BackendError, PrecisionNotApplied
from zsseg_rt.export.graph_files import GRAPH_PRECISIONS
from zsseg_rt.networks import heads, pooled
from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.writer import save_onnx

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
TARGETS = ("8.6", "8.9", "12.0")
# Blocks that attend, and how many of them one fused kernel serves: RTX 1.7 has none for float32
ATTENTION_BLOCKS = {"image_encoder": 3, "decoder": 2}
FUSED_PRECISIONS = ("float16", "bfloat16")


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


@pytest.fixture(scope="module")
def region_graphs(tmp_path_factory):
    """The graphs of a small CLIP-RC with the official model's 64 channels a head."""
    from support import tiny
    from zsseg_rt.export import export_graphs

    sizes = tiny.TinySizes(
        width=128, num_heads=2, embed_dim=128, decoder_heads=2, num_layers=2, grid_side=8
    )
    folder = tmp_path_factory.mktemp("region_graphs")
    export_graphs(tiny.clip_rc_model(sizes), folder, precisions=GRAPH_PRECISIONS)
    return folder


@pytest.fixture(autouse=True)
def rtx(monkeypatch):
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")


def build(path, precision, **options):
    """A plan whose products are all in the precision; for compute capability 8.9 if unsaid."""
    options = BackendOptions(**{"compute_capability": "8.9", **options})
    plan = BACKEND.build_plan(path, precision=precision, options=options)
    assert plan.report["precision"] == precision
    products = [row for row in plan.report["layers"] if row["type"] == "MATRIX_MULTIPLY"]
    assert {row["dtype"] for row in products} == {precision}
    return plan


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", GRAPH_PRECISIONS)
@pytest.mark.parametrize("name", ATTENTION_BLOCKS)
def test_graph_builds_in_its_precision_with_attention_fused(graphs, name, precision, target):
    path = graphs / f"{name}.{precision}.onnx"
    plan = build(path, precision, compute_capability=target)
    report = plan.report
    kept = {r["dtype"] for r in report["layers"] if r["type"] in ("NORMALIZATION", "SOFTMAX")}
    assert kept == {"float32"}
    halves = FAMILIES["descriptor"].half_tensors if precision == "float16" else ()
    for spec in report["inputs"] + report["outputs"]:
        assert spec["dtype"] == ("float16" if spec["name"] in halves else "float32"), spec
    assert len(plan.data) > path.stat().st_size * 0.9  # the weights are inside, at their width
    if not report["runtime"].startswith("tensorrt_rtx-1.7."):
        pytest.skip(f"fused kernels' names are known for RTX 1.7, not for {report['runtime']}")
    blocks = ATTENTION_BLOCKS[name] if precision in FUSED_PRECISIONS else 0
    assert fused_kernels(plan) == (blocks, blocks)
    assert softmax_layers(report) == ATTENTION_BLOCKS[name]


@pytest.mark.parametrize("precision", GRAPH_PRECISIONS)
@pytest.mark.parametrize(("name", "blocks"), [("image_encoder", 2), ("decoder", 6)])
def test_clip_rc_graph_builds_in_its_precision(region_graphs, name, precision, blocks):
    plan = build(region_graphs / f"{name}.{precision}.onnx", precision)
    report = plan.report
    assert softmax_layers(report) == blocks
    assert report["axes"].get("classes") == (None if name == "image_encoder" else [1, 32, 1024])
    if precision in FUSED_PRECISIONS and report["runtime"].startswith("tensorrt_rtx-1.7."):
        assert fused_kernels(plan)[0] >= blocks  # the mask does not prevent it


@pytest.fixture(scope="module")
def cat_seg_graphs(tmp_path_factory):
    from support.golden_cat_seg import tiny_model
    from zsseg_rt.export import export_graphs

    folder = tmp_path_factory.mktemp("cat_seg")
    export_graphs(tiny_model(most_classes=8), folder, precisions=GRAPH_PRECISIONS)
    return folder


@pytest.mark.parametrize(
    ("name", "precision"),
    [("head", "float32"), ("head", "bfloat16")]  # all operations that the three parts have
    + [(name, "float16") for name in ("image_encoder", "head", "head_1", "head_2", "head_3")],
)
def test_cat_seg_graph_builds_in_its_precision(cat_seg_graphs, name, precision):
    path = cat_seg_graphs / f"{name}.{precision}.onnx"
    report = build(path, precision, dynamic_axes={"classes": (1, 8, 8)}).report
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
    build(path, "float32")


def small_encoder(kind, width, num_blocks=2):
    """A tower of random weights in a published model's widths, by the rule of its vectors."""
    cells = 36 + (kind != "siglip")
    square, tall = (width, width), (4 * width, width)
    shapes = {"conv1.weight": (width, 3, 16, 16), "positional_embedding": (cells, width)}
    shapes |= {"ln_post.weight": (width,), "ln_post.bias": (width,)}
    if kind == "siglip":
        shapes["conv1.bias"] = (width,)
    else:
        shapes |= {"class_embedding": (width,), "proj": (width, 512)}
        shapes |= {"ln_pre.weight": (width,), "ln_pre.bias": (width,)}
    parts = {f"transformer.resblocks.{i}.": ("ln_1", "ln_2") for i in range(num_blocks)}
    parts |= {} if kind == "clip" else {"attn_pool.": ("layernorm",)}
    for at, norms in parts.items():
        shapes |= {f"{at}{norm}.{end}": (width,) for norm in norms for end in ("weight", "bias")}
        shapes |= {f"{at}attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{at}attn.in_proj_bias": (3 * width,), f"{at}attn.out_proj.weight": square}
        shapes |= {f"{at}mlp.c_fc.weight": tall, f"{at}mlp.c_proj.weight": tall[::-1]}
        shapes |= {f"{at}attn.out_proj.bias": (width,), f"{at}mlp.c_proj.bias": (width,)}
        shapes |= {f"{at}mlp.c_fc.bias": (4 * width,)}
    tensors = {key: weight("", key, shape, ()) for key, shape in shapes.items()}
    activation = {"clip": "gelu", "pe": "gelu", "siglip": "gelu_tanh"}[kind]
    made = ImageTower if kind == "clip" else pooled.PooledTower
    return made(tensors=tensors, num_heads=width // 64, activation=activation)


@pytest.mark.parametrize("target", ["8.6", "8.9"])
@pytest.mark.parametrize(("kind", "width"), [("clip", 256), ("pe", 384), ("siglip", 768)])
def test_small_encoders_build_with_attention_fused(kind, width, target, tmp_path):
    graph, tower = Graph(), small_encoder(kind, width)
    image = graph.input("image", (1, 3, 336, 336))
    made = (
        heads.dense_embeds(graph, tower, image, "naclip")
        if kind == "clip"
        else pooled.dense_embeds(graph, tower, image)
    )
    graph.output("patch_embeds", made)
    half = to_half(graph.network(), half=("image", "patch_embeds"))
    save_onnx(half, "image_encoder", tmp_path / "a.onnx")
    plan = build(tmp_path / "a.onnx", "float16", compute_capability=target)
    assert softmax_layers(plan.report) == 2
    if plan.report["runtime"].startswith("tensorrt_rtx-1.7."):
        assert sum(fused_kernels(plan)) == 2 * 2  # two names for each


def softmax_layers(report):
    return sum(row["count"] for row in report["layers"] if row["type"] == "SOFTMAX")


def test_the_class_axis_is_dynamic(graphs):
    given = BackendOptions(compute_capability="8.9", dynamic_axes={"classes": (1, 16, 256)})
    report = BACKEND.build_plan(graphs / "decoder.float16.onnx", options=given).report
    assert report["axes"] == {"classes": [1, 16, 256]}
    shapes = {spec["name"]: spec["shape"] for spec in report["inputs"] + report["outputs"]}
    assert shapes["queries"][:2] == [1, "classes"]
    assert shapes["class_embeds"][:2] == [1, "classes"]
    assert "classes" not in shapes["patch_keys"]


@pytest.mark.parametrize(
    ("held", "asked"), [("float32", "float16"), ("float16", "int8"), ("float32", "bfloat16")]
)
def test_a_precision_the_graph_does_not_hold_is_refused(graphs, held, asked):
    with pytest.raises(PrecisionNotApplied, match=f"in {asked}, got decoder.{held}.onnx with"):
        BACKEND.build_plan(graphs / f"decoder.{held}.onnx", precision=asked)


def test_bfloat16_needs_a_gpu_that_has_it(graphs):
    options = BackendOptions(compute_capability="7.5")
    with refused(PrecisionNotApplied, "precision", "8.0", "bfloat16", "7.5"):
        BACKEND.build_plan(graphs / "decoder.bfloat16.onnx", options=options)


@pytest.mark.parametrize("target", ["8.7", "9.0", "10.0", "11.0", "sm86", ""])
def test_a_gpu_that_rtx_cannot_target_is_refused(graphs, target):
    options = BackendOptions(compute_capability=target)
    with refused(BackendError, "compute_capability", "7.5", "8.0", "8.6", "8.9", "12.0"):
        BACKEND.build_plan(graphs / "decoder.float16.onnx", options=options)
