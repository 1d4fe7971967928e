"""Dense CLIP as a bundle: written without torch from a weights file, and by torch."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from support import tiny
from support.command_line import run
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, BundleError, CheckpointError, ShapeError
from zsseg_rt.export import export_bundle, export_graphs
from zsseg_rt.export.clip_file import DenseHead, export_clip_file
from zsseg_rt.export.text_side import imagenet_templates
from zsseg_rt.models import create_model
from zsseg_rt.networks import heads
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.ops import reference
from zsseg_rt.torch_files.clip_arrays import read_clip

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
TOWERS = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
SIZE_HW = (64, 96)
TEMPLATES = ["a {}.", "the {}", "see {}"]
ROUNDING = 1e-5
HEADS = [name for name in heads.HEADS if name not in RULES_OF_OUTLIERS]
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}

# What the command line runs, in a process that must not load torch.
CHILD = """
import sys
from zsseg_rt.cli import main
code = main(sys.argv[1:])
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "open_clip", "onnx", "torchvision"}
sys.exit(code)
"""


def save(path, salt="", **changes):
    tensors = {key: value.contiguous() for key, value in tiny.clip_state_dict(SIZES, salt).items()}
    tensors.update(changes)
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "clip.safetensors")


def build(weights, **config):
    options = {"activation": "quick_gelu", "image_size": SIZE_HW, **TOWERS, **config}
    return create_model("dense_clip", pretrained=weights, **options)


def settings(**changes):
    fields = {"size_hw": SIZE_HW, "activation": "quick_gelu", **TOWERS, **changes}
    return DenseHead(**fields)


def assert_same(written, traced):
    """Two bundles that label alike, stage by stage."""
    one, other = Bundle.load(written), Bundle.load(traced)
    for part in ("family", "architecture", "head", "preprocess"):
        assert getattr(one, part) == getattr(other, part)
    for part in ("templates", "template_set", "context_length", "embed_dim", "words", "space"):
        assert getattr(one.text, part) == getattr(other.text, part)
    texts = [(path / "tokenizer.json").read_text() for path in (written, traced)]
    assert texts[0] == texts[1]
    actual, expected = (dict(np.load(path / "golden.npz")) for path in (written, traced))
    assert actual.keys() == expected.keys()
    for stage in ("image", "text_embeds", "prompt_embeds", "patch_embeds", "mask_logits"):
        largest = max(1, np.abs(expected[stage]).max())
        assert np.abs(actual[stage] - expected[stage]).max() <= ROUNDING * largest, stage
    assert one.graphs == other.graphs  # to the byte


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_runs_checkpoint_is_read(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in tiny.clip_state_dict(SIZES).items()}
    saved = {f"module.{key}": value for key, value in tensors.items()}
    torch.save({"epoch": np.int64(3), "state_dict": saved}, tmp_path / "epoch_3.pt")
    floats = {key: value.float().contiguous() for key, value in tensors.items()}
    save_file(floats, tmp_path / "clip.safetensors")
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "run.safetensors")
    expected = read_clip(tmp_path / "clip.safetensors")
    for name in ("epoch_3.pt", "run.safetensors"):
        clip = read_clip(tmp_path / name)
        for mine, theirs in ((clip.visual, expected.visual), (clip.text, expected.text)):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("head", ["naclip", "maskclip"])
def test_it_equals_what_torch_writes(head, weights, tmp_path):
    options = {"templates": TEMPLATES, "space": "s"}
    written = export_clip_file(weights, tmp_path / "a.zsseg", settings(head=head), **options)
    model = build(weights, head=head)
    assert_same(written, export_bundle(model, tmp_path / "b.zsseg", verify=False, **options))
    Bundle.load(written).verify()


@pytest.mark.parametrize(("source", "head"), [("demo", "sc_clip"), ("file", "maskclip")])
def test_the_command_loads_no_torch(source, head, weights, tmp_path):
    clip = weights if source == "file" else "demo"
    heads = ["--num-heads", str(SIZES.num_heads), "--text-heads", str(SIZES.text_heads)]
    call = [sys.executable, "-c", CHILD, "export", "dense-clip", "--clip", str(clip)]
    call += ["--head", head, "--out", str(tmp_path / "a.zsseg")]
    call += [] if source == "demo" else [*heads, "--activation", "gelu", "--size", "64"]
    environment = {**os.environ, "ZSSEG_HOME": str(tmp_path / "home")}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(tmp_path / "a.zsseg")
    assert bundle.architecture == f"dense_clip {head}"
    assert set(bundle.graphs["image_encoder"]) == {"float32", "float16"}
    assert bundle.provenance["source"] == (weights.name if source == "file" else "demo")
    assert json.loads((bundle.path / "tokenizer.json").read_text())


def broken_file(kind, path):
    """A file that is no whole CLIP."""
    state = tiny.clip_state_dict(SIZES)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    if kind == "damaged":
        save(path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "no text tower":
        save_file({k: v.contiguous() for k, v in state.items() if k.startswith("visual.")}, path)
    elif kind == "absent tensor":
        save(path, **{name: None})
    elif kind == "nan":
        save(path, **{name: state[name] * float("nan")})


@pytest.mark.parametrize("kind", ["damaged", "no text tower", "absent tensor", "nan", "missing"])
def test_files_that_are_no_clip_are_refused(kind, tmp_path):
    path, out = tmp_path / "clip.safetensors", tmp_path / "a.zsseg"
    broken_file(kind, path)
    with pytest.raises(CheckpointError, match=r"clip\.safetensors"):
        export_clip_file(path, out, settings())
    assert not out.exists()


def test_bad_settings_are_refused(weights, tmp_path):
    for error, argument, changes in (
        (ArgumentError, "head", {"head": "nothing"}),
        (ArgumentError, "activation", {"activation": "relu"}),
        (ArgumentError, "logit_scale", {"logit_scale": 0.0}),
        (ArgumentError, "unknown_below", {"unknown_below": 2.0}),
        (ShapeError, "image_size", {"size_hw": (60, 64)}),
        (CheckpointError, "num_heads", {"num_heads": 7}),
        (CheckpointError, "text_heads", {"text_heads": 0}),
    ):
        with refused(error, argument):
            export_clip_file(weights, tmp_path / "a.zsseg", settings(**changes))
    with refused(ArgumentError, "text_encoder"):
        export_clip_file(weights, tmp_path / "a.zsseg", settings(), text_encoder=None)
    with refused(BundleError, "path"):
        export_clip_file(weights, tmp_path / "a", settings())
    assert list(tmp_path.iterdir()) == []


# --- by torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_one_attention_a_product_and_nothing_unused(head, weights, tmp_path):
    """A softmax for each product of the head's rule; no MLP where the head has none."""
    files = export_graphs(build(weights, head=head), tmp_path, precisions=("float32",))
    graph = onnx.load(tmp_path / files["image_encoder"]["float32"].file).graph
    operators = [node.op_type for node in graph.node]
    before = SIZES.num_layers - 1
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


def test_classes_by_name_with_synonyms_and_templates(weights, tmp_path):
    """Words go through the exported text tower; synonyms compete and count for their class."""
    model = build(weights)
    path = export_bundle(
        model, tmp_path / "a.zsseg", precisions=("float32",), templates=TEMPLATES, verify=False
    )
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


def test_the_command_line_with_torch(weights, tmp_path, capsys):
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
    assert manifest["provenance"]["source"] == "clip.safetensors"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--size", "4x4x4"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '4x4x4'"),
        (("--size", "-16"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '-16'"),
        (("--activation", "relu"), 2, "--activation: expected quick_gelu or gelu, got relu"),
        (("--head", "x"), 1, "head: expected one of vanilla, maskclip, sclip, clearclip, naclip"),
        (("--clip", "demo"), 2, "--pretrained: expected"),
        ((), 1, "--pretrained: expected a CLIP file, got absent.pt"),
    ],
)
def test_command_line_refusals_with_torch(tmp_path, capsys, arguments, code, message):
    out = tmp_path / "c.zsseg"
    assert run("export", "dense-clip", "--clip", "ViT-B-16", "--out", out) == 2
    status = run("export", "dense-clip", "--pretrained", "absent.pt", "--out", out, *arguments)
    assert status == code
    assert message in capsys.readouterr().err
    assert not out.exists()
