"""Networks written and computed without torch, stage by stage against the torch models."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper

from support import golden_cat_seg, tiny
from support.descriptor_models import run_parts
from support.errors import refused
from support.golden import assert_close, case_of, load
from support.graph_runs import run_encoder, run_file
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.architectures import cat_seg as cat_seg_export
from zsseg_rt.export.architectures.descriptor import export_descriptor, parts_of
from zsseg_rt.export.architectures.zeroseg import export_zeroseg, student_of
from zsseg_rt.export.clip_file import DenseHead, tower_of
from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.models import create_model, from_official
from zsseg_rt.networks import cat_seg, zeroseg
from zsseg_rt.networks.aggregating import local_outlier_factor, num_local_outliers, repair
from zsseg_rt.networks.heads import dense_embeds
from zsseg_rt.networks.layers import resize_grid
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, under


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size_hw", [(7, 19), (28, 28), (3, 2), (14, 14)])
def test_positions_are_resized_as_torch_does(mode, antialias, size_hw):
    grid = np.random.default_rng(2).standard_normal((14, 14, 5), np.float32)
    planes = torch.from_numpy(grid.transpose(2, 0, 1)[None])
    settings = {"mode": mode, "align_corners": False, "antialias": antialias}
    expected = F.interpolate(planes, size_hw, **settings)[0].permute(1, 2, 0).numpy()
    resized = resize_grid(grid, size_hw, mode, antialias=antialias)
    np.testing.assert_allclose(resized, expected, atol=3e-6)


# --- SFP and SC-CLIP: against the official vectors, then as bundles ---

STAGES = 2e-5  # relative; the vectors' README measured 7.1e-6 between float32 and float64
LOGITS = 1e-5
SMALL = [
    *(f"sfp_{pm}" for pm in ("som", "l2", "lof")),
    *("sfp_som_tight", "sfp_som_wide", "sfp_som_wide_size_pos", "sfp_l2_tall"),
    *("sfp_som_few", "sfp_som_none", "sfp_isolated_l2", "sfp_isolated_som"),
    *("sc", "sc_tight", "sc_wide", "sc_wide_size_pos", "sc_6_layers"),
]
REAL = ["sfp_l2_224", "sfp_som_224", "sc_224", "sfp_som_288x416", "sc_288x416"]
STAGE_NAMES = ["levels_sum", "repaired_last", "repaired_mid", "g", "h", "sim_attention"]
STAGE_NAMES += ["aggregated", "attended", "attended_b"]


def model_of(c):
    """A dense CLIP with the settings of a case, and an image tower by the vectors' rule."""
    sizes = tiny.TinySizes(
        width=c["width"], num_layers=c["layers"], patch_size=c["patch"],
        grid_side=c["grid"], embed_dim=c["out"],
    )  # fmt: skip
    shapes = tiny.expanded(under("visual.", IMAGE_TOWER), sizes)
    shapes = {key.removeprefix("visual."): shape for key, shape in shapes.items()}
    weights = tiny.rule_state_dict(shapes, c["salt"], c["gains"])
    settings = {
        "head": "sfp" if c["method"] == "sfp" else "sc_clip",
        "pm": c["pm"].lower(),
        "r": c["res_cls"],
        "position": "as_published" if c["position"] == "official" else "size",
        "num_heads": c["heads"],
        **{name: c[name] for name in ("pre", "post", "first", "end") if name in c},
    }
    return from_official("dense_clip", weights, **settings)


def embed(ops, model, image):
    head, position = model.config.head, model.config.position
    settings = {"position": position, "aggregation": model.config.aggregation}
    return dense_embeds(ops, tower_of(model), image, head, **settings)


def run_graph(model, image, path):
    return run_encoder(lambda graph, x: embed(graph, model, x), image, path)


@pytest.mark.parametrize("case", SMALL)
def test_every_stage_is_the_official_one(shared_dir, case, tmp_path):
    method = "sfp" if case.startswith("sfp") else "scclip"
    expected, c = case_of(load(shared_dir, f"{method}_small_public.npz"), case)
    model, image = model_of(c), expected["image"]
    arrays = Arrays()
    embeds = embed(arrays, model, image)
    outliers = np.flatnonzero(arrays.marks["outliers"][0, :, 0])
    np.testing.assert_array_equal(outliers, expected["outliers"])
    names = [name for name in STAGE_NAMES if name in expected]
    assert len(names) >= (1 if "official_is_nan" in expected else 9)
    for name in names:
        assert_close(arrays.marks[name][0], expected[name], STAGES)
    assert_close(embeds[0] @ expected["text"].T, expected["logits"], LOGITS)
    written = run_graph(model, image, tmp_path / "a.onnx")
    assert_close(written[0] @ expected["text"].T, expected["logits"], LOGITS)
    tokens = {"pre": c["pre"], "post": c["post"], "last": c["layers"] - 2}
    for name, layer in () if "official_is_nan" in expected else tokens.items():
        assert_close(arrays.marks[f"blocks.{layer}"][0], expected[f"tokens_{name}"], STAGES)
    text = torch.from_numpy(expected["text"])
    with torch.no_grad():
        out = model(torch.from_numpy(image), text)
        up = model.predict(torch.from_numpy(image), text)[0, :, ::4, ::4].numpy()
    assert_close(out.mask_logits[0].flatten(1).T, expected["logits"], LOGITS)
    if "logits_up_sub4" in expected:
        assert_close(up, expected["logits_up_sub4"], LOGITS)
    if "official_is_nan" not in expected:
        features = expected["features"]
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        assert_close(out.patch_embeds[0].flatten(1).T, unit, STAGES)


@pytest.mark.nightly
@pytest.mark.parametrize("case", REAL)
def test_vit_b16_has_the_official_labels(shared_dir, case, tmp_path):
    expected, c = case_of(load(shared_dir, "tf2_real_public.npz"), case)
    mean, std = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    image = ((expected["rgb"] - np.array(mean)) / std).astype(np.float32).transpose(2, 0, 1)
    text = tiny.random_normal("input.text", (20, 512), c["salt"])
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    model, image = model_of(c), np.ascontiguousarray(image[None])
    embeds = run_graph(model, image, tmp_path / "a.onnx")
    with torch.no_grad():
        out = model(torch.from_numpy(image), torch.from_numpy(text)).mask_logits
    for logits in (embeds[0] @ text.T, out[0].flatten(1).T.numpy()):
        assert np.abs(logits - expected["logits"]).max() <= LOGITS
        np.testing.assert_array_equal(logits.argmax(1), expected["logits"].argmax(1))


@pytest.mark.parametrize(
    "case", ["inside", "corners", "edges", "touching", "corner_block", "block", None]
)
def test_outliers_become_the_mean_of_sound_neighbours(shared_dir, case):
    vectors = load(shared_dir, "tf2_ops_public.npz")
    x, outliers = vectors["repair/x"], np.zeros((1, len(vectors["repair/x"]), 1), np.float32)
    if case is not None:
        outliers[0, vectors[f"repair/{case}/outliers"]] = 1
    repaired = repair(Arrays(), x[None], outliers, tuple(vectors["repair/grid"]))[0]
    expected = x if case is None else vectors[f"repair/{case}/sc_clip"]
    np.testing.assert_allclose(repaired, expected, atol=1e-6)  # sums of eight
    sound = outliers[0, :, 0] == 0
    np.testing.assert_array_equal(repaired[sound], x[sound])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_local_outlier_factors_are_the_official_ones(shared_dir, case):
    vectors = load(shared_dir, "tf2_ops_public.npz")
    scores = local_outlier_factor(Arrays(), vectors[f"lof/{case}/x"][None])[0, :, 0]
    np.testing.assert_allclose(scores, vectors[f"lof/{case}/score"], atol=2e-5)
    count = num_local_outliers(len(scores))
    outliers = np.sort(np.argsort(-scores)[:count])
    np.testing.assert_array_equal(outliers, vectors[f"lof/{case}/outliers"])


def test_settings_out_of_range_are_refused():
    of_files = [("pm", "L3"), ("r", -1.0), ("beta", 0.0), ("beta", float("nan"))]
    of_files.append(("position", "bicubic"))
    for setting, value in of_files:
        with refused(ArgumentError, setting):
            DenseHead(head="sfp", **{setting: value})
    for setting, value in (*of_files, ("pre", 11), ("end", 12)):
        with refused(ArgumentError, setting):
            create_model("dense_clip", pretrained="demo", head="sfp", **{setting: value})


# --- whole systems: graphs in OpenVINO against the same functions in NumPy ---


GRAPHS = 5e-6  # the same sums in another order


def assert_graph_is(path, network, expected, feeds, rounding=GRAPHS):
    """Within rounding of every value, relative to the largest; and a graph that ONNX accepts."""
    save_onnx(network, "graph", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    outputs = run_file(path, feeds)
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        assert outputs[name].shape == value.shape
        assert np.abs(outputs[name] - value).max() <= rounding * np.abs(value).max(), name


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=[96, 144])
def network(request):
    model = golden_cat_seg.tiny_model(padding=256, view=request.param)
    return cat_seg_export.network_of(model)


@pytest.mark.parametrize("name", list(cat_seg.GRAPHS))
def test_cat_seg(network, name, tmp_path):
    compute, inputs = cat_seg.GRAPHS[name]
    graph = cat_seg_export.graphs_of(network)[name]()
    for count in (1, 33) if name != "image_encoder" else (1,):
        shapes = {one: network.shapes()[one] for one in inputs.split()}
        sized = {
            one: [count if size == "classes" else size for size in s] for one, s in shapes.items()
        }
        feeds = {one: random(*shape) for one, shape in sized.items()}
        feeds |= {one: np.abs(feeds[one]) + 1 for one in feeds if "totals" in one}
        feeds |= {"padding": np.array([256.0 - count], np.float32)} if "padding" in feeds else {}
        assert_graph_is(tmp_path / "a.onnx", graph, compute(Arrays(), network, feeds), feeds)


DESCRIPTORS = {
    "zegclip": ("zegclip", {}, (64, 64)),
    "zegclip other shape": ("zegclip", {}, (48, 96)),
    "zegclip no prompts": ("zegclip", {"num_prompts": 0}, (80, 16)),
    "zegclip one layer": ("zegclip", {"decoder_layers": 1}, (130, 70)),  # which patches do not fill
    "clip_rc": ("clip_rc", {}, (64, 64)),
    "clip_rc other grid": ("clip_rc", {"num_cells": 9}, (96, 112)),
    "clip_rc one cell": (
        "clip_rc",
        {"num_cells": 1, "num_prompts": 1, "num_layers": 2, "grid_side": 3},
        (48, 48),
    ),
    "clip_rc odd sizes": (
        "clip_rc",
        {"num_cells": 9, "width": 96, "num_heads": 6, "num_prompts": 7, "patch_size": 8,
         "grid_side": 6},
        (80, 48),
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", DESCRIPTORS)
def test_descriptors(case, tmp_path):
    """Folded parts, in graphs and in the runtime's order, against the model."""
    name, changes, size_hw = DESCRIPTORS[case]
    sizes = tiny.TinySizes(**changes)
    model = (tiny.zegclip_model if name == "zegclip" else tiny.clip_rc_model)(sizes, "a")
    grid_hw = tuple(side // sizes.patch_size for side in size_hw)
    image, text = tiny.image(2, 3, *size_hw, salt="a"), tiny.text_embeds(7, 32, "a")
    output = model(image, text)
    assert output.mask_logits.shape == (2, 7, *grid_hw)
    assert output.mask_logits.std() > 0.05  # lively enough for the comparison to mean something
    logits = run_parts(model, image, text)
    torch.testing.assert_close(logits, output.mask_logits, rtol=0, atol=5e-5)

    fits = size_hw == tuple(side * sizes.patch_size for side in grid_hw)
    options = ExportOptions(size_hw=size_hw if fits else None)
    exported, parts = export_descriptor(model, options), parts_of(model)
    image = random(1, 3, *exported.preprocess.size_hw)
    encoded = parts.encode(Arrays(), image)
    expected = dict(zip(("patch_embeds", "cls_embed"), encoded, strict=True))
    graphs = {name: graph() for name, graph in exported.graphs.items()}
    assert_graph_is(tmp_path / "e.onnx", graphs["image_encoder"], expected, {"image": image})
    for classes in (1, 33):
        queries = random(len(encoded[1]), classes, len(parts.projection()[0].weight))
        feeds = {"queries": queries, "patch_embeds": encoded[0]}
        decoded = parts.decode(Arrays(), **feeds)
        expected = dict(zip(("class_embeds", "patch_keys"), decoded, strict=True))
        assert_graph_is(tmp_path / "d.onnx", graphs["decoder"], expected, feeds)


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 96)])
def test_zeroseg(size_hw, tmp_path):
    model = zeroseg_model()
    graph = export_zeroseg(model, ExportOptions(size_hw=size_hw)).graphs["image_encoder"]
    image = random(1, 3, *size_hw)
    stages = zeroseg.segments(Arrays(), student_of(model), image)
    names = ("segment_embeds", "image_embed", "group_map")
    expected = dict(zip(names, stages, strict=True))
    # Shares are a steep softmax of similarities, twice; worst seen 8.7e-6 (Xeon with AMX)
    assert_graph_is(tmp_path / "a.onnx", graph(), expected, {"image": image}, rounding=2e-5)
    with torch.no_grad():
        in_torch = model(torch.from_numpy(image))
    for value, other in zip(stages, in_torch, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), other, rtol=1e-4, atol=1e-5)


# --- weights in half the bytes ---


ROWS = 40


def stored(weight, folder, precision="float32", opset=20):
    """A product with a weight and a sum: in plain float32, and as stored, with its tensors."""
    graph = Graph()
    sums = graph.add(graph.matmul(graph.input("x", (2, ROWS)), weight), np.ones(ROWS, np.float32))
    graph.output("y", sums)
    model = replace(graph.network(), opset=opset)
    save_onnx(model, "linear", folder / "plain.onnx")
    save_graphs({"linear": lambda: model}, folder, (precision,))
    names = ("plain.onnx", f"linear.{precision}.onnx")
    plain, small = (onnx.load(folder / name) for name in names)
    return plain, small, {tensor.name: tensor for tensor in small.graph.initializer}


def random_halves():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, ROWS)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("opset", [17, 20, 21])
def test_exact_weights_take_half_the_bytes_and_give_the_same_numbers(opset, tmp_path):
    plain, small, tensors = stored(random_halves(), tmp_path, opset=opset)
    kinds = {name: tensor.data_type for name, tensor in tensors.items()}
    assert kinds == {"/MatMul.1.half": TensorProto.FLOAT16, "/Add.1": TensorProto.FLOAT}
    assert small.opset_import[0].version == opset
    assert small.ByteSize() < 0.55 * plain.ByteSize()
    x = np.random.default_rng(1).standard_normal((2, ROWS)).astype(np.float32)
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
        for m in (plain, small)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("value", [1 + 2**-20, 1e6, 1e-9, np.nan])
def test_one_inexact_number_keeps_the_weight(value, tmp_path):
    weight = random_halves()
    weight[3, 4] = value
    tensors = stored(weight, tmp_path)[2]
    assert {tensor.data_type for tensor in tensors.values()} == {TensorProto.FLOAT}
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["/MatMul.1"]), weight)


def test_bfloat16_rounds_as_torch_does(tmp_path):
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((ROWS, ROWS)) * 10.0 ** rng.integers(-38, 38, ROWS)).astype("f4")
    weight[0, :8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8
    tensors = stored(weight, tmp_path, "bfloat16")[2]
    assert {one.data_type for one in tensors.values()} == {TensorProto.BFLOAT16}
    values = numpy_helper.to_array(tensors["/MatMul.1.half"]).astype(np.float32)
    expected = torch.from_numpy(weight).bfloat16().float().numpy()
    np.testing.assert_array_equal(values, expected)
