"""CAT-Seg beside the CLIP that it was tuned from: what is equal, and a file of the rest."""

import contextlib
import io

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import golden_cat_seg, tiny
from support.command_line import run
from support.errors import refused
from zsseg_rt import Bundle
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models import load_checkpoint
from zsseg_rt.torch_files.cat_seg_arrays import equal_keys, official_arrays, read_cat_seg
from zsseg_rt.torch_files.clip_arrays import read_clip
from zsseg_rt.torch_files.weights import DIFFERS_FROM

PREFIX = golden_cat_seg.CLIP
SIZES = golden_cat_seg.TINY | {"v_layers": 9}
TUNED = 2 * (SIZES["v_layers"] + SIZES["t_layers"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """OpenAI's CLIP in float16 and float32, and what tuning q and v made of it."""
    folder = tmp_path_factory.mktemp("official")
    shapes = golden_cat_seg.official_shapes(SIZES)
    weights = {key: w.half().float() for key, w in tiny.rule_state_dict(shapes).items()}
    clip = joined({k.removeprefix(PREFIX): w for k, w in weights.items() if k.startswith(PREFIX)})
    torch.save({key: weight.half() for key, weight in clip.items()}, folder / "ViT-B-16.pt")
    save_file(clip, folder / "open_clip_model.safetensors")
    tuned = {
        key: w + 1e-3 if key.endswith(("q_proj_weight", "v_proj_weight")) else w
        for key, w in weights.items()
    }
    torch.save({"model": tuned, "iteration": 80000}, folder / "model_base.pth")
    return folder


def joined(split):
    """OpenAI's layout: q, k and v in one tensor."""
    found = {}
    for key, weight in split.items():
        if key.endswith(("k_proj_weight", "v_proj_weight")):
            continue
        if key.endswith("q_proj_weight"):
            parts = [split[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            key, weight = key.replace("q_proj_weight", "in_proj_weight"), torch.cat(parts)
        found[key] = weight
    return found


def imported(checkpoint, out, *options):
    return run("import-checkpoint", "cat_seg", checkpoint, "--out", out, "--precision", "float32",
               *options)  # fmt: skip


@pytest.fixture(scope="module")
def made(folder):
    """A bundle, a difference, and what the command printed."""
    out, small = folder / "cat_seg.zsseg", folder / "difference.safetensors"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        options = ("--clip", folder / "ViT-B-16.pt", "--difference", small)
        assert imported(folder / "model_base.pth", out, *options) == 0
    return out, small, said.getvalue()


def graphs(bundle):
    return {path.name: path.read_bytes() for path in bundle.glob("*.onnx")}


def read(path, clip):
    return read_cat_seg(path, official_arrays(read_clip(clip)))


def test_a_difference_and_its_clip_are_the_whole_checkpoint(folder, made, tmp_path):
    out, small, said = made
    bundle = Bundle.load(out)
    assert (bundle.family, bundle.aggregation.most) == ("aggregation", 256)
    assert bundle.preprocess.size_hw == (384, 384)
    weights = load_checkpoint(folder / "model_base.pth")
    of_clip = [key for key in weights if key.startswith(PREFIX)]
    assert f"{len(of_clip) - TUNED} of {len(of_clip)} tensors of CLIP ViT-B-16.pt" in said
    own = load_file(small)
    tuned = {key for key in of_clip if key.endswith(("q_proj_weight", "v_proj_weight"))}
    assert own.keys() == tuned | (weights.keys() - set(of_clip))
    # the same CLIP in float32 and in another container
    other = folder / "open_clip_model.safetensors"
    whole = read(small, other)
    assert whole.keys() == weights.keys()
    assert all((whole[key] == weights[key].numpy()).all() for key in weights)
    assert imported(small, tmp_path / "again.zsseg", "--clip", other) == 0
    assert graphs(tmp_path / "again.zsseg") == graphs(out)
    assert graphs(out)


def test_a_difference_needs_the_clip_that_it_was_made_with(folder, made, tmp_path, capsys):
    small = made[1]
    with refused(CheckpointError, "difference.safetensors", "--clip"):
        load_checkpoint(small)
    clip = load_file(folder / "open_clip_model.safetensors")
    key = "visual.transformer.resblocks.3.mlp.c_fc.bias"
    one_bit = clip | {key: torch.nextafter(clip[key], torch.ones(()))}
    save_file(one_bit, tmp_path / "one_bit.safetensors")
    save_file({k: v for k, v in clip.items() if k != "logit_scale"}, tmp_path / "less.safetensors")
    for other in ([], *(["--clip", tmp_path / f"{n}.safetensors"] for n in ("one_bit", "less"))):
        assert imported(small, tmp_path / "x.zsseg", *other) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "--clip" in line
        assert "ViT-B-16.pt" in line
    # what the checkpoint has of its own does not matter
    clip["transformer.resblocks.0.attn.in_proj_weight"][: SIZES["t_width"]] += 1
    save_file(clip, tmp_path / "tuned.safetensors")
    assert read(small, tmp_path / "tuned.safetensors") is not None


def test_a_damaged_difference_is_refused(folder, made, tmp_path):
    small, clip = tmp_path / "d.safetensors", folder / "ViT-B-16.pt"
    with safe_open(made[1], framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata) == 3
    for name in metadata:
        save_file(load_file(made[1]), small, {k: v for k, v in metadata.items() if k != name})
        if name == DIFFERS_FROM:  # then it is like any other file, which lacks keys
            assert imported(small, tmp_path / "x.zsseg", "--clip", clip) == 1
        else:
            with refused(CheckpointError, "clip", "d.safetensors"):
                read(small, clip)
    small.write_bytes(made[1].read_bytes()[:1000])
    with refused(CheckpointError, "d.safetensors"):
        read(small, clip)


def test_what_is_equal_is_equal_bit_for_bit(folder, tmp_path, capsys):
    weights = read_cat_seg(folder / "model_base.pth")
    clip = official_arrays(read_clip(folder / "ViT-B-16.pt"))
    assert clip.keys() == {key for key in weights if key.startswith(PREFIX)}
    equal = set(equal_keys(weights, clip))
    key = PREFIX + "visual.ln_pre.bias"
    zero = {key: np.zeros_like(weights[key])}
    assert key not in equal_keys(weights | zero, clip | {key: -zero[key]})
    nan = {key: np.full_like(weights[key], np.nan)}
    assert set(equal_keys(weights | nan, clip | nan)) == equal
    wider = {key: np.zeros(len(weights[key]) + 1, np.float32)}
    assert set(equal_keys(weights | wider, clip)) == equal - {key}
    towers = {k: v for k, v in weights.items() if ".visual." in k or PREFIX not in k}
    assert set(equal_keys(towers, clip)) == {k for k in equal if ".visual." in k}
    save_file(
        {k: v + 1 for k, v in load_file(folder / "open_clip_model.safetensors").items()},
        tmp_path / "other.safetensors",
    )
    wrong = ("--clip", tmp_path / "other.safetensors", "--difference", tmp_path / "d.safetensors")
    assert imported(folder / "model_base.pth", tmp_path / "x.zsseg", *wrong) == 1
    assert "zsseg-rt: --clip: expected" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors"]


def test_a_difference_is_a_new_file_beside_a_clip(folder, tmp_path, capsys):
    (tmp_path / "here.safetensors").write_bytes(b"mine")
    for name, clip in (("d.safetensors", False), ("here.safetensors", True), ("d.pth", True)):
        options = ["--clip", folder / "ViT-B-16.pt"] if clip else []
        options += ["--difference", tmp_path / name]
        assert imported(folder / "model_base.pth", tmp_path / "x.zsseg", *options) == 2
        assert "zsseg-rt: --difference: expected" in capsys.readouterr().err
    assert (tmp_path / "here.safetensors").read_bytes() == b"mine"
