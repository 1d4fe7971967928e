"""Bundles of a CLIP's weights file, written without torch, against those that torch writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support import tiny
from support.command_line import run
from support.errors import refused
from zsseg_rt import Bundle
from zsseg_rt.errors import ArgumentError, BundleError, CheckpointError, ShapeError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.clip_file import DenseHead, export_clip_file
from zsseg_rt.models import create_model
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.networks.heads import HEADS

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
TOWERS = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
SIZE_HW = (64, 96)
TEMPLATES = ["a {}.", "the {}", "see {}"]
ROUNDING = 1e-5

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


def settings(**changes):
    given = {"size_hw": SIZE_HW, "activation": "quick_gelu", **TOWERS, **changes}
    return DenseHead(**given)


def read_golden(path):
    with np.load(path / "golden.npz") as file:
        return dict(file)


def assert_same(written, traced):
    """Two bundles that label alike, stage by stage."""
    one, other = Bundle.load(written), Bundle.load(traced)
    for part in ("family", "architecture", "head", "preprocess"):
        assert getattr(one, part) == getattr(other, part)
    for part in ("templates", "template_set", "context_length", "embed_dim", "words", "space"):
        assert getattr(one.text, part) == getattr(other.text, part)
    texts = [(path / "tokenizer.json").read_text() for path in (written, traced)]
    assert texts[0] == texts[1]
    found, expected = read_golden(written), read_golden(traced)
    assert found.keys() == expected.keys()
    for stage in ("image", "text_embeds", "prompt_embeds", "patch_embeds", "mask_logits"):
        largest = max(1, np.abs(expected[stage]).max())
        assert np.abs(found[stage] - expected[stage]).max() <= ROUNDING * largest, stage
    assert one.graphs == other.graphs  # to the byte


READ = """
import sys
import numpy as np
from zsseg_rt.torch_files.clip_arrays import read_clip
one, other = (read_clip(path) for path in sys.argv[1:])
for mine, theirs in ((one.visual, other.visual), (one.text, other.text)):
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_runs_checkpoint_is_read_without_torch(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in tiny.clip_state_dict(SIZES).items()}
    saved = {f"module.{key}": value for key, value in tensors.items()}
    torch.save({"epoch": np.int64(3), "state_dict": saved}, tmp_path / "epoch_3.pt")
    floats = {key: value.float().contiguous() for key, value in tensors.items()}
    save_file(floats, tmp_path / "clip.safetensors")
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "run.safetensors")
    for name in ("epoch_3.pt", "run.safetensors"):
        files = [tmp_path / name, tmp_path / "clip.safetensors"]
        done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("head", [name for name in HEADS if name not in RULES_OF_OUTLIERS])
def test_it_equals_what_torch_writes(head, weights, tmp_path):
    pytest.importorskip("torch", reason="needs pip install '.[train]'")
    options = {"templates": TEMPLATES, "space": "s"}
    written = export_clip_file(weights, tmp_path / "a.zsseg", settings(head=head), **options)
    model = create_model(
        "dense_clip",
        pretrained=weights,
        head=head,
        activation="quick_gelu",
        image_size=SIZE_HW,
        **TOWERS,
    )
    assert_same(written, export_bundle(model, tmp_path / "b.zsseg", **options))
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
    elif kind == "another model":
        save_file({f"vision_model.{k}": v.contiguous() for k, v in state.items()}, path)
    elif kind == "absent tensor":
        save(path, **{name: None})
    elif kind == "shape":
        save(path, **{name: state[name][:, :-1].contiguous()})
    elif kind == "nan":
        save(path, **{name: state[name] * float("nan")})
    elif kind == "integers":
        save(path, **{name: state[name].int()})
    elif kind == "text":
        path.write_text("no weights")


@pytest.mark.parametrize(
    "kind",
    [
        *("damaged", "no text tower", "another model", "absent tensor"),
        *("shape", "nan", "integers", "text", "missing"),
    ],
)
def test_files_that_are_no_clip_are_refused(kind, tmp_path, capsys):
    path, out = tmp_path / "clip.safetensors", tmp_path / "a.zsseg"
    broken_file(kind, path)
    with pytest.raises(CheckpointError, match=r"clip\.safetensors"):
        export_clip_file(path, out, settings())
    assert not out.exists()
    code = run("export", "dense-clip", "--clip", path, "--out", out)
    told = capsys.readouterr().err
    assert (code, told.count("\n")) == (1, 1), told


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--clip", "demo", "--pretrained", "openai"), "--pretrained"),
        (("--clip", "ViT-B-16"), "--pretrained"),
    ],
)
def test_options_that_contradict_each_other(arguments, named, tmp_path, capsys):
    assert run("export", "dense-clip", *arguments, "--out", tmp_path / "a.zsseg") == 2
    assert f"{named}: expected" in capsys.readouterr().err
