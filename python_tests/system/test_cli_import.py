"""Official checkpoint files become bundles from the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import golden_cat_seg, tiny, tiny_zegformer
from support.colour_words import colour_embeds, write_encoder
from support.command_line import python, run
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.models import from_official, load_clip
from zsseg_rt.ops import reference
from zsseg_rt.torch_files.clip_arrays import read_clip, read_floats
from zsseg_rt.torch_files.official import SEGMENT_TEMPLATES, equal_keys, official_arrays

# Heads follow from widths as in the official models: one per 64 channels, eight in the decoder.
SIZES = tiny.TinySizes(
    width=64, num_heads=1, embed_dim=64, decoder_heads=8, text_heads=1, num_layers=2, text_layers=1
)
CAT_SIZES = golden_cat_seg.TINY | {"v_layers": 9}
NAMES = ["road", "person", "car", "sky", "tree", "dog", "cat"]


@pytest.fixture(scope="module")
def state_dict():
    return tiny.zegclip_state_dict(SIZES)


@pytest.fixture
def checkpoint(state_dict, tmp_path):
    """The layout that the official training script writes, optimizer and all."""
    path = tmp_path / "iter_20000.pth"
    content = {
        "meta": {"iter": 20000, "CLASSES": NAMES},
        "state_dict": state_dict,
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
    }
    torch.save(content, path)
    return path


def without_torch(architecture, *arguments):
    """Output of an import in a process that has neither torch nor the package onnx."""
    call = ["import-checkpoint", architecture, *map(str, arguments), "--precision", "float32"]
    program = (
        "import sys; sys.modules.update(torch=None, onnx=None)\n"
        f"from zsseg_rt.cli import main; sys.exit(main({call!r}))"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imported_bundle_agrees_with_the_model(checkpoint, state_dict, tmp_path):
    out = tmp_path / "zegclip.zsseg"
    classes = ("--classes", ",".join(NAMES), "--seen", "road,car")
    without_torch("zegclip", checkpoint, "--out", out, *classes)
    bundle = Bundle.load(out)
    assert bundle.head.seen == ("road", "car")
    assert bundle.head.seen_bias == pytest.approx(0.1)
    model = from_official("zegclip", state_dict, seen_classes=(0, 2))
    embeds = tiny.text_embeds(7, 64)
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    image = reference.preprocess(
        frame, size_hw=(64, 64), mean=bundle.preprocess.mean, std=bundle.preprocess.std
    )
    with torch.inference_mode():
        scores = model.predict(torch.from_numpy(image[None]), embeds)[0].numpy()
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(bundle, config) as engine:
        engine.set_classes(NAMES, embeddings=embeds.numpy())
        labels = engine.segment(frame).labels
    top = np.sort(scores, axis=0)
    real = top[-1] - top[-2] > 1e-4
    assert real.mean() > 0.9
    assert (labels == scores.argmax(0))[real].mean() >= 0.999


def test_clip_rc_is_imported(tmp_path):
    source, out = tmp_path / "official.pth", tmp_path / "a.zsseg"
    torch.save({"state_dict": tiny.clip_rc_state_dict(SIZES)}, source)
    options = ("--self-trained", "--size", "32x80")
    assert "remark" not in without_torch("clip_rc", source, "--out", out, *options)
    bundle = Bundle.load(out)
    assert (bundle.architecture, bundle.preprocess.size_hw) == ("clip_rc", (32, 80))


def test_a_data_set_brings_its_classes_and_its_split(checkpoint, tmp_path, capsys):
    out = tmp_path / "zegclip.zsseg"
    call = ("import-checkpoint", "zegclip", checkpoint, "--out", out, "--precision", "float32")
    assert run(*call, "--dataset", "voc2012") == 0
    head = Bundle.load(out).head
    assert (len(head.seen), head.seen_bias) == (15, pytest.approx(0.1))
    assert head.seen[0] == "aeroplane"
    printed = capsys.readouterr().out
    assert f"reading {checkpoint}" in printed
    assert "writing the graphs" in printed
    assert "remark" not in printed
    assert run(*call, "--dataset", "voc2012", "--seen", "cat") == 2
    assert run(*call, "--dataset", "voc2011") == 2
    assert run(*call, "--classes", "road,car", "--seen", "moon") == 2
    assert "--seen: expected names from --classes, got 'moon'" in capsys.readouterr().err
    assert run(*call) == 1  # it is there
    assert "remark: without --dataset or --seen" in capsys.readouterr().out


def test_openais_clip_is_fetched_as_fetch_does(checkpoint, tmp_path, monkeypatch, capsys):
    """Without a network it answers at once, and only for a checkpoint that is there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    for file in (checkpoint, tmp_path / "absent.pth"):
        call = ("import-checkpoint", "zegformer", file, "--clip", "openai", "--dataset", "voc2012")
        assert run(*call, "--out", tmp_path / "z.zsseg") == 1
        message = capsys.readouterr().err
        assert ("expected to download" in message) == file.exists()
        assert "zsseg-rt fetch" not in message


def test_dense_export_from_the_command_line(tmp_path, capsys):
    encoder, names_file, rows = tmp_path / "e.onnx", tmp_path / "n.json", tmp_path / "r.npy"
    write_encoder(encoder)
    names, embeds = colour_embeds()
    names_file.write_text(json.dumps(names))
    np.save(rows, embeds)
    out = tmp_path / "dense.zsseg"
    arguments = ("export", "dense", encoder, "--out", out, "--size", 256, "--mean", "none")
    assert run(*arguments, "--bank", names_file, rows) == 0
    assert Bundle.load(out).text_bank.names == names
    assert run(*arguments, "--bank", names_file, rows, "--overwrite", "--mean", "wat") == 2
    np.save(rows, embeds[:3])
    assert run(*arguments, "--bank", names_file, rows, "--overwrite") == 1
    assert run(*arguments, "--bank", names_file, tmp_path / "gone.npy", "--overwrite") == 1
    content = encoder.read_bytes()
    np.save(rows, embeds)
    for broken in (content[: len(content) // 2], content.replace(b"AveragePool", b"AveragePoop")):
        encoder.write_bytes(broken)
        assert run(*arguments, "--bank", names_file, rows, "--overwrite") == 1
    assert Bundle.load(out).text_bank.names == names
    *others, cut, unheard = capsys.readouterr().err.splitlines()
    assert all(line.startswith("zsseg-rt: ") for line in others)
    assert all(line.startswith(f"zsseg-rt: {encoder}: ") for line in (cut, unheard))


def test_other_generations_of_cat_seg_are_refused(tmp_path, capsys):
    path, out = tmp_path / "model_final.pth", tmp_path / "cat_seg.zsseg"
    weights = tiny.rule_state_dict(golden_cat_seg.official_shapes(CAT_SIZES))
    earlier = {key: value for key, value in weights.items() if "upsample" not in key}
    torch.save({"model": earlier}, path)
    assert imported(path, out) == 1
    weights[golden_cat_seg.CLIP + "visual.conv1.weight"] = torch.zeros(32, 3, 14, 14)
    torch.save({"model": weights}, path)
    capsys.readouterr()
    assert imported(path, out) == 1
    assert "CAT-Seg L" in capsys.readouterr().err
    assert not out.exists()


CLIP = tiny_zegformer.CLIP


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The authors' files: a checkpoint of training, and OpenAI's CLIP beside it.

    The query decoder has eight heads, as in every official model.
    """
    folder = tmp_path_factory.mktemp("official")
    state_dict = tiny_zegformer.state_dict()
    trained = {key: value for key, value in state_dict.items() if not key.startswith(CLIP)}
    clip = {
        key.removeprefix(CLIP): value for key, value in state_dict.items() if key.startswith(CLIP)
    }
    content = {"model": trained, "optimizer": {"state": {}}, "iteration": 9999}
    torch.save(content, folder / "model_final.pth")
    torch.save({"model": state_dict}, folder / "model_eval.pth")
    words = torch.from_numpy(tiny.random_normal("words", (49408, 64))).float()
    clip |= {"token_embedding.weight": words, "positional_embedding": torch.zeros(77, 64)}
    torch.save(clip, folder / "ViT-B-16.pt")
    return folder


def test_an_imported_zegformer_agrees_with_the_model(files, tmp_path):
    out = tmp_path / "zegformer.zsseg"
    options = ("--classes", ",".join(NAMES), "--seen", "road,car", "--prompts", "imagenet_select")
    options += ("--clip", files / "ViT-B-16.pt", "--size", "96x64", "--calibration", "0.2")
    without_torch("zegformer", files / "model_final.pth", "--out", out, *options)
    bundle = Bundle.load(out)
    assert bundle.family == "proposals"
    assert bundle.head.seen == ("road", "car")
    assert bundle.head.seen_bias == pytest.approx(0.2)
    assert bundle.text.templates == SEGMENT_TEMPLATES
    clip = load_clip(files / "ViT-B-16.pt", activation="quick_gelu")
    trained = torch.load(files / "model_final.pth", weights_only=True)["model"]
    model = from_official("zegformer", trained, clip=clip, seen_classes=(0, 2), calibration=0.2)
    image = tiny_zegformer.image(96, 64)
    texts = [tiny_zegformer.text_features(salt) for salt in "ab"]
    with torch.inference_mode():
        maps = model([image], *texts, [(96, 64)]).sem_seg[0].numpy()
    frame = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    with Engine(bundle, EngineConfig(device="cpu", precision="float32", use_cache=False)) as engine:
        engine.set_classes(NAMES, embeddings=np.stack([text.numpy() for text in texts]))
        labels = engine.segment(frame).labels
    ranked = np.sort(maps, axis=0)
    clear = ranked[-1] - ranked[-2] > 2e-4  # a flipped mask pixel moves scores by up to 1e-3
    assert clear.mean() > 0.8
    assert (labels == maps.argmax(0))[clear].all()


def error_of(capsys, *arguments):
    code = run("import-checkpoint", "zegformer", *arguments)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("zsseg-rt: ")]
    assert len(lines) == 1
    return code, lines[0]


def test_a_checkpoint_of_training_needs_clip(files, tmp_path, capsys):
    out = tmp_path / "x.zsseg"
    code, error = error_of(capsys, files / "model_final.pth", "--out", out)
    assert code == 1
    assert "expected CLIP's weights under 'sem_seg_head.predictor.clip_model.'" in error
    lost = ("--clip", tmp_path / "gone.pt")
    code, error = error_of(capsys, files / "model_final.pth", "--out", out, *lost)
    assert code == 1
    assert "gone.pt" in error
    assert not out.exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys):
    path, out = tmp_path / "other.pth", tmp_path / "x.zsseg"
    torch.save({"state_dict": tiny.zegclip_state_dict()}, path)
    code, error = error_of(capsys, path, "--out", out)
    assert code == 1
    assert "backbone.res2.0.conv1.weight: expected a tensor of 4 axes, as in zegformer" in error
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, path)
    assert run("import-checkpoint", "zegclip", path, "--out", out) == 1
    assert "backbone." in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--fusion", "max", "--fusion: expected one of seen_and_unseen, all_classes, regions"),
        ("--prompts", "long", "--prompts: expected one of single, imagenet_select, got long"),
        ("--size", "100", "--size: expected multiples of 32"),
        ("--region-style", "box", "--region-style: expected one of cropmask, mask, crop"),
    ],
)
def test_settings_outside_their_range(files, tmp_path, capsys, option, value, message):
    arguments = (files / "model_eval.pth", "--out", tmp_path / "x.zsseg", option, value)
    code, error = error_of(capsys, *arguments)
    assert code in (1, 2)
    assert message in error


PREFIX = golden_cat_seg.CLIP
TUNED = 2 * (CAT_SIZES["v_layers"] + CAT_SIZES["t_layers"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """OpenAI's CLIP in float16 and float32, and what tuning q and v made of it."""
    folder = tmp_path_factory.mktemp("official")
    shapes = golden_cat_seg.official_shapes(CAT_SIZES)
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
    whole = {}
    for key, weight in split.items():
        if key.endswith(("k_proj_weight", "v_proj_weight")):
            continue
        if key.endswith("q_proj_weight"):
            parts = [split[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            key, weight = key.replace("q_proj_weight", "in_proj_weight"), torch.cat(parts)
        whole[key] = weight
    return whole


def imported(checkpoint, out, *options):
    return run("import-checkpoint", "cat_seg", checkpoint, "--out", out, "--precision", "float32",
               *options)  # fmt: skip


def test_a_checkpoint_beside_its_clip_says_what_is_equal_bit_for_bit(folder, tmp_path):
    out = tmp_path / "cat_seg.zsseg"
    clip_file = ("--clip", folder / "ViT-B-16.pt")
    said = without_torch("cat_seg", folder / "model_base.pth", "--out", out, *clip_file)
    bundle = Bundle.load(out)
    assert (bundle.family, bundle.aggregation.most) == ("aggregation", 256)
    assert bundle.preprocess.size_hw == (384, 384)
    weights = read_floats(folder / "model_base.pth")
    clip = official_arrays(read_clip(folder / "open_clip_model.safetensors"))
    assert clip.keys() == {key for key in weights if key.startswith(PREFIX)}
    assert f"{len(clip) - TUNED} of {len(clip)} tensors of CLIP ViT-B-16.pt" in said
    tuned = {key for key in clip if key.endswith(("q_proj_weight", "v_proj_weight"))}
    assert set(equal_keys(weights, clip)) == clip.keys() - tuned


def test_a_clip_that_shares_nothing_is_refused(folder, tmp_path, capsys):
    other = {k: v + 1 for k, v in load_file(folder / "open_clip_model.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    wrong = ("--clip", tmp_path / "other.safetensors")
    assert imported(folder / "model_base.pth", tmp_path / "x.zsseg", *wrong) == 1
    assert "zsseg-rt: --clip: expected" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors"]
