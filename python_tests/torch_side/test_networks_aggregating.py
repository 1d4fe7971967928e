"""SFP and SC-CLIP as written graphs: against the official vectors, then as bundles."""

import numpy as np
import onnx
import pytest

from support.errors import refused

torch = pytest.importorskip("torch")

from support import tiny  # noqa: E402
from support.command_line import run  # noqa: E402
from support.golden import case_of, load  # noqa: E402
from support.graph_runs import run_file  # noqa: E402
from support.official_heads import SMALL, model_of, small  # noqa: E402
from zsseg_rt import Bundle, Engine, EngineConfig, models  # noqa: E402
from zsseg_rt.errors import ArgumentError, ShapeError  # noqa: E402
from zsseg_rt.export import export_bundle, verify_bundle  # noqa: E402
from zsseg_rt.export.clip_file import DenseHead, export_clip_file  # noqa: E402
from zsseg_rt.networks.aggregating import local_outlier_factor, num_local_outliers, repair  # noqa: E402
from zsseg_rt.networks.clip import ImageTower  # noqa: E402
from zsseg_rt.networks.heads import dense_embeds  # noqa: E402
from zsseg_rt.onnx.arrays import Arrays  # noqa: E402
from zsseg_rt.onnx.graph import Graph  # noqa: E402
from zsseg_rt.onnx.writer import save_onnx  # noqa: E402

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


def assert_close(found, expected, tolerance):
    """Within a tolerance, relative to ``max(1, |expected|max)``."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def embed(ops, model, image):
    config = model.config.image_encoder
    tower = ImageTower(
        tensors={key: value.numpy() for key, value in model.image_encoder.state_dict().items()},
        num_heads=config.num_heads,
        activation=config.activation,
    )
    head, position = model.config.head, model.config.position
    settings = {"position": position, "aggregation": model.config.aggregation}
    return dense_embeds(ops, tower, image, head, **settings)


def run_graph(model, image, path):
    """What OpenVINO computes of the written graph."""
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
    assert_close(out.mask_logits[0].flatten(1).T.numpy(), expected["logits"], LOGITS)
    if "logits_up_sub4" in expected:
        assert_close(up, expected["logits_up_sub4"], LOGITS)
    if "official_is_nan" not in expected:
        features = expected["features"]
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        assert_close(out.patch_embeds[0].flatten(1).T.numpy(), unit, STAGES)


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
    model = models.create_model("dense_clip", pretrained="demo", image_size=(96, 128), **settings)
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
    model = models.create_model("dense_clip", pretrained="demo", head="sfp", pm=pm)
    with refused(ShapeError, "image"):
        export_bundle(model, path, size_hw=(side, side))
    assert not path.exists()


def test_a_trunk_with_too_few_blocks_is_refused(tmp_path):
    from safetensors.torch import save_file

    sizes = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
    tensors = {key: value.contiguous() for key, value in tiny.clip_state_dict(sizes).items()}
    save_file(tensors, tmp_path / "clip.safetensors")
    heads = {"num_heads": sizes.num_heads, "text_heads": sizes.text_heads}
    head = DenseHead(head="sc_clip", size_hw=(128, 128), activation="gelu", **heads)
    with refused(ArgumentError, "pre"):
        export_clip_file(tmp_path / "clip.safetensors", tmp_path / "a.zsseg", head)


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
        models.create_model("dense_clip", pretrained="demo", head="sfp", **{setting: value})
