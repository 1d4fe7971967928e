"""Networks written and computed without torch, stage by stage against the torch models."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from support import tiny
from support.command_line import run
from support.errors import refused
from support.golden import assert_close, case_of, load
from support.graph_runs import run_file
from support.official_heads import SMALL, model_of, small
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.export import export_bundle, verify_bundle
from zsseg_rt.export.clip_file import DenseHead, export_clip_file, tower_of
from zsseg_rt.models import create_model
from zsseg_rt.networks.aggregating import (
    RULES_OF_OUTLIERS,
    local_outlier_factor,
    num_local_outliers,
    repair,
)
from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.heads import HEADS, dense_embeds
from zsseg_rt.networks.layers import resize_grid
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.writer import save_onnx, with_exact_halves

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
ROUNDING = 1e-5  # the same sums in another order


def build(tmp_path, head="naclip", activation="quick_gelu", halves=False):
    """A model of random weights, which float16 holds exactly if ``halves``."""
    weights = tiny.clip_state_dict(SIZES, salt=head)
    if halves:
        weights = {key: value.half().float() for key, value in weights.items()}
    torch.save(weights, tmp_path / "clip.pt")
    heads = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
    given = {"pretrained": tmp_path / "clip.pt", "head": head, "activation": activation}
    return create_model("dense_clip", image_size=64, **given, **heads)


def tensors_of(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


def picture(size_hw, batch=1):
    return np.random.default_rng(size_hw).standard_normal((batch, 3, *size_hw), np.float32)


@torch.no_grad()
def torch_stages(model, image):
    encoder, found = model.image_encoder, {}
    tokens = found["ln_pre"] = encoder.embed_patches(torch.from_numpy(image))
    for index, block in enumerate(encoder.transformer.resblocks[:-1]):
        tokens = found[f"blocks.{index}"] = block(tokens)
    found["patch_embeds"] = encoder(torch.from_numpy(image)).patch_embeds
    return {name: value.numpy() for name, value in found.items()}


def assert_near(found, expected):
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= ROUNDING * max(1, np.abs(value).max()), name


@pytest.mark.parametrize("size_hw", [(64, 64), (32, 112), (144, 80)])
@pytest.mark.parametrize("head", [name for name in HEADS if name not in RULES_OF_OUTLIERS])
def test_every_stage_equals_torch(head, size_hw, tmp_path):
    """Computed by NumPy, and as a graph whose outputs are all stages."""
    activation = "gelu" if size_hw == (144, 80) else "quick_gelu"
    model = build(tmp_path, head, activation, halves=size_hw == (32, 112))
    image, tower = picture(size_hw), tower_of(model)
    expected = torch_stages(model, image)
    arrays = Arrays()
    dense_embeds(arrays, tower, image, head)
    assert_near(arrays.marks, expected)
    graph = Graph()
    dense_embeds(graph, tower, graph.input("image", image.shape), head)
    for name in expected:
        graph.output(name, graph.marks[name])
    path = tmp_path / "stages.onnx"
    save_onnx(with_exact_halves(graph.network()), "image_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert_near(run_file(path, {"image": image}), expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_equals_torch(activation, tmp_path):
    model = build(tmp_path, activation=activation)
    tensors = tensors_of(model.text_encoder)
    tower = TextTower(tensors=tensors, num_heads=SIZES.text_heads, activation=activation)
    ids = np.random.default_rng(5).integers(1, 49407, (6, 77))
    ids[np.arange(6), [3, 9, 20, 41, 76, 5]] = 49407
    with torch.no_grad():
        expected = {"text_embeds": model.text_encoder(torch.from_numpy(ids)).numpy()}
    assert_near({"text_embeds": tower.embed(Arrays(), ids)}, expected)
    graph = Graph()
    token_ids = graph.input("token_ids", ("prompts", 77), "int64")
    graph.output("text_embeds", tower.embed(graph, token_ids))
    path = tmp_path / "text.onnx"
    save_onnx(with_exact_halves(graph.network()), "text_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert check_graph(path).token_rows == {"token_ids": 49408}
    assert_near(run_file(path, {"token_ids": ids}), expected)


@pytest.mark.parametrize("half", [(), ("image", "patch_embeds")])
def test_float16(half, tmp_path):
    model, image = build(tmp_path, "sclip"), picture((64, 64))
    graph, path = Graph(), tmp_path / "half.onnx"
    made = dense_embeds(graph, tower_of(model), graph.input("image", image.shape), "sclip")
    graph.output("patch_embeds", made)
    save_onnx(to_half(graph.network(), half=half), "image_encoder", path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    types = {value.name: value.type.tensor_type.elem_type for value in written.graph.input}
    assert types == {"image": onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    large = [one for one in written.graph.initializer if np.prod(one.dims) > 1024]
    assert {one.data_type for one in large} == {onnx.TensorProto.FLOAT16}
    found = run_file(path, {"image": image})["patch_embeds"]
    assert np.abs(found - torch_stages(model, image)["patch_embeds"]).max() < 2e-3  # 11 bits


def test_weights_of_half_precision_take_half_the_bytes(tmp_path):
    sizes = {}
    for halves in (False, True):
        graph, path = Graph(), tmp_path / "a.onnx"
        tower = tower_of(build(tmp_path, halves=halves))
        made = dense_embeds(graph, tower, graph.input("image", (1, 3, 64, 64)), "naclip")
        graph.output("patch_embeds", made)
        save_onnx(with_exact_halves(graph.network()), "image_encoder", path)
        sizes[halves] = path.stat().st_size
    assert sizes[True] < 0.6 * sizes[False]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size_hw", [(7, 19), (28, 28), (3, 2), (14, 14)])
def test_positions_are_resized_as_torch_does(mode, antialias, size_hw):
    grid = np.random.default_rng(2).standard_normal((14, 14, 5), np.float32)
    planes = torch.from_numpy(grid.transpose(2, 0, 1)[None])
    settings = {"mode": mode, "align_corners": False, "antialias": antialias}
    expected = F.interpolate(planes, size_hw, **settings)[0].permute(1, 2, 0).numpy()
    found = resize_grid(grid, size_hw, mode, antialias=antialias)
    np.testing.assert_allclose(found, expected, atol=3e-6)


# --- SFP and SC-CLIP: against the official vectors, then as bundles ---

STAGES = 2e-5  # relative; the vectors' README measured 7.1e-6 between float32 and float64
LOGITS = 1e-5
REAL = [
    "sfp_l2_224",
    *(
        pytest.param(case, marks=pytest.mark.nightly)
        for case in ("sfp_som_224", "sc_224", "sfp_som_288x416", "sc_288x416")
    ),
]
STAGE_NAMES = ["levels_sum", "repaired_last", "repaired_mid", "g", "h", "sim_attention"]
STAGE_NAMES += ["aggregated", "attended", "attended_b"]


def embed(ops, model, image):
    head, position = model.config.head, model.config.position
    settings = {"position": position, "aggregation": model.config.aggregation}
    return dense_embeds(ops, tower_of(model), image, head, **settings)


def run_graph(model, image, path):
    graph = Graph()
    graph.output("patch_embeds", embed(graph, model, graph.input("image", image.shape)))
    save_onnx(graph.network(), "image_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return run_file(path, {"image": image})["patch_embeds"]


@pytest.mark.parametrize("case", SMALL)
def test_every_stage_is_the_official_one(shared_dir, case, tmp_path):
    expected, c = small(shared_dir, case)
    model, image = model_of(c), expected["image"]
    arrays = Arrays()
    embeds = embed(arrays, model, image)
    found = np.flatnonzero(arrays.marks["outliers"][0, :, 0])
    np.testing.assert_array_equal(found, expected["outliers"])
    known = [name for name in STAGE_NAMES if name in expected]
    assert len(known) >= (1 if "official_is_nan" in expected else 9)
    for name in known:
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


@pytest.mark.parametrize("case", REAL)
def test_vit_b16_has_the_official_labels(shared_dir, case, tmp_path):
    expected, c = case_of(load(shared_dir, "tf2_real_public.npz"), case)
    mean, std = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    image = ((expected["rgb"] - np.array(mean)) / std).astype(np.float32).transpose(2, 0, 1)
    text = tiny.random_normal("input.text", (20, 512), c["salt"])
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    model, image = model_of(c), np.ascontiguousarray(image[None])
    made = run_graph(model, image, tmp_path / "a.onnx")
    with torch.no_grad():
        out = model(torch.from_numpy(image), torch.from_numpy(text)).mask_logits
    for logits in (made[0] @ text.T, out[0].flatten(1).T.numpy()):
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
    found = np.sort(np.argsort(-scores)[:count])
    np.testing.assert_array_equal(found, vectors[f"lof/{case}/outliers"])


@pytest.mark.parametrize("head", ["sfp", "sc_clip"])
def test_the_command_makes_a_bundle_that_labels(head, tmp_path):
    path = tmp_path / "a.zsseg"
    options = ("--head", head, "--size", "128", "--beta", "0.8", "--position", "as_published")
    assert run("export", "dense-clip", "--clip", "demo", *options, "--out", path) == 0
    bundle = Bundle.load(path)
    assert bundle.architecture == f"dense_clip {head}"
    assert verify_bundle(path).passed
    assert set(bundle.graphs["image_encoder"]) == {"float32", "float16"}
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(bundle, config) as engine:
        engine.set_classes(["red ball", "grass"], templates=["{}"])
        assert engine.segment(np.zeros((32, 48, 3), np.uint8)).labels.shape == (32, 48)


@pytest.mark.parametrize("pm", ["l2", "som", "lof"])
def test_a_model_in_torch_makes_the_same_bundle(pm, tmp_path):
    settings = {"head": "sfp", "pm": pm, "r": 0.4, "beta": 0.7}
    model = create_model("dense_clip", pretrained="demo", image_size=(96, 128), **settings)
    options = {"precisions": ("float32",), "templates": ["{}"], "space": "s"}
    traced = export_bundle(model, tmp_path / "a.zsseg", **options)
    head = DenseHead(size_hw=(96, 128), **settings)
    written = export_clip_file("demo", tmp_path / "b.zsseg", head, **options)
    files = [np.load(path / "golden.npz") for path in (traced, written)]
    for stage in ("patch_embeds", "mask_logits"):
        np.testing.assert_allclose(files[1][stage], files[0][stage], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("pm", "side"), [("l2", 32), ("lof", 64)])
def test_grids_with_too_few_patches_are_refused(pm, side, tmp_path):
    path = tmp_path / "a.zsseg"
    with refused(ShapeError, "image"):
        export_clip_file("demo", path, DenseHead(head="sfp", pm=pm, size_hw=(side, side)))
    model = create_model("dense_clip", pretrained="demo", head="sfp", pm=pm)
    with refused(ShapeError, "image"):
        export_bundle(model, path, size_hw=(side, side))
    assert not path.exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pm", "L3"),
        ("r", -1.0),
        ("beta", 0.0),
        ("beta", float("nan")),
        ("position", "bicubic"),
        ("pre", 11),
        ("end", 12),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    if setting not in ("pre", "end"):  # settings of models alone
        with refused(ArgumentError, setting):
            DenseHead(head="sfp", **{setting: value})
    with refused(ArgumentError, setting):
        create_model("dense_clip", pretrained="demo", head="sfp", **{setting: value})
