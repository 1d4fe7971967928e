"""Dense CLIP as a bundle: graphs, golden sample, engine and command line against torch."""

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from support import tiny
from support.command_line import run
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.export import export_bundle
from zsseg_rt.export.text_side import imagenet_templates
from zsseg_rt.models import create_model
from zsseg_rt.networks import heads
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.ops import reference

HEADS = [name for name in heads.HEADS if name not in RULES_OF_OUTLIERS]

pytest.importorskip("torch", reason="needs pip install '.[train]'")

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
SIZE_HW = (64, 96)
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny CLIP's file in OpenAI's layout."""
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(tiny.clip_state_dict(SIZES), path)
    return path


def build(weights, **config):
    heads = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
    given = {"activation": "quick_gelu", "image_size": SIZE_HW, **heads, **config}
    return create_model("dense_clip", pretrained=weights, **given)


@pytest.fixture(scope="module", params=HEADS)
def exported(request, weights, tmp_path_factory):
    """Each head's model and bundle."""
    model = build(weights, head=request.param)
    path = tmp_path_factory.mktemp("bundles") / f"{request.param}.zsseg"
    full = request.param == "naclip"  # the text tower is the same for all
    return model, export_bundle(
        model,
        path,
        text_encoder="auto" if full else None,
        precisions=("float32", "float16"),
        templates=["a {}.", "the {}", "see {}"],
    )


def image_graph(path, precision="float32"):
    return onnx.load(path / Bundle.load(path).graphs["image_encoder"][precision].file)


def test_one_attention_a_product_and_nothing_unused(exported):
    """A softmax for each product of the head's rule; no MLP where the head has none."""
    model, path = exported
    graph = image_graph(path).graph
    operators = [node.op_type for node in graph.node]
    before, head = SIZES.num_layers - 1, model.config.head
    products = {"sclip": 2, "maskclip": 0}.get(head, 1)
    assert operators.count("Softmax") == before + products
    mlps = before + (head in ("vanilla", "sclip", "maskclip"))
    assert operators.count("Sigmoid") == mlps  # one a QuickGELU
    assert not set(operators) & {"If", "Loop", "Scan", "Pow", "ReduceMean"}
    assert [value.name for value in graph.output] == ["patch_embeds"]
    # Projections that the head reads and the one out; MaskCLIP's are merged.
    last = {"vanilla": 4, "sclip": 4, "clearclip": 3, "naclip": 3, "maskclip": 1}
    sizes = [tuple(tensor.dims) for tensor in graph.initializer]
    assert sizes.count((SIZES.width, SIZES.width)) == 4 * before + last[head]


def torch_scores(model, frame, embeds):
    """Probabilities at frame size, in the engine's order: upsample, then softmax."""
    size, mean, std = model.config.size_hw, model.image_mean, model.image_std
    image = reference.preprocess(frame, size_hw=size, mean=mean, std=std)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image[None]), torch.tensor(embeds)).mask_logits
        up = F.interpolate(logits, frame.shape[:2], mode="bilinear", align_corners=False)
    return up[0].softmax(0).numpy()


@pytest.mark.parametrize("exported", ["naclip"], indirect=True)
def test_classes_by_name_with_synonyms_and_templates(exported, tmp_path):
    """Words go through the exported text tower; synonyms compete and count for their class."""
    model, path = exported
    frame = np.random.default_rng(4).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    phrases = ["dog", "puppy", "road"]
    with Engine(path, EngineConfig(cache_dir=tmp_path, **{**CPU, "use_cache": True})) as engine:
        rows = engine.set_classes(phrases).embeds
        engine.set_classes([["dog", "puppy"], "road"])
        labels = engine.segment(frame).labels
        assert engine.self_check().passed
    scores = torch_scores(model, frame, rows)
    top = np.sort(scores, axis=0)
    real = top[-1] - top[-2] > 1e-4
    expected = np.array([0, 0, 1])[scores.argmax(0)]
    assert (labels == expected)[real].mean() >= 0.999


def test_threshold_and_default_templates_reach_the_bundle(weights, tmp_path):
    model = build(weights, unknown_below=0.9, logit_scale=12.5)
    path = export_bundle(
        model, tmp_path / "a.zsseg", text_encoder=None, precisions=("float32",), verify=False
    )
    bundle = Bundle.load(path)
    assert bundle.head.unknown_below == 0.9
    with Engine(bundle, EngineConfig(device="cpu", precision="float32")) as engine:
        assert engine.self_check().passed  # the golden labels are without threshold
    assert bundle.head.logit_scale == 12.5
    assert bundle.text.template_set == "imagenet-80"
    assert bundle.text.templates == imagenet_templates()
    published = pytest.importorskip("open_clip").OPENAI_IMAGENET_TEMPLATES
    assert bundle.text.templates == tuple(template("{}") for template in published)


def test_command_line(weights, tmp_path, capsys):
    out = tmp_path / "c.zsseg"
    heads = ("--num-heads", SIZES.num_heads, "--text-heads", SIZES.text_heads)
    code = run(
        *("export", "dense-clip", "--pretrained", weights, "--out", out, "--size", "64x32"),
        *("--head", "clearclip", "--activation", "quick_gelu", *heads),
        *("--template", "a {}.", "--precision", "float32"),
    )
    assert code == 0, capsys.readouterr().err
    manifest = json.loads((out / "bundle.json").read_text())
    assert manifest["architecture"] == "dense_clip clearclip"
    assert manifest["head"]["grid_hw"] == [4, 2]
    assert manifest["head"]["logit_scale"] == 50.0
    assert set(manifest["graphs"]) == {"image_encoder", "text_encoder"}
    assert manifest["provenance"]["source"] == "clip.pt"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--size", "4x4x4"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '4x4x4'"),
        (("--size", "-16"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '-16'"),
        (("--activation", "relu"), 2, "--activation: expected quick_gelu or gelu, got relu"),
        (("--head", "x"), 1, "head: expected one of vanilla, maskclip, sclip, clearclip, naclip"),
        ((), 1, "--pretrained: expected a CLIP file, got absent.pt"),
    ],
)
def test_command_line_refusals(tmp_path, capsys, arguments, code, message):
    out = tmp_path / "c.zsseg"
    found = run("export", "dense-clip", "--pretrained", "absent.pt", "--out", out, *arguments)
    assert found == code
    assert message in capsys.readouterr().err
    assert not out.exists()
