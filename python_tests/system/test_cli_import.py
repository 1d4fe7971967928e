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


@pytest.fixture
def checkpoint(tmp_path):
    """The layout that the official training script writes, optimizer and all."""
    path = tmp_path / "iter_20000.pth"
    content = {
        "meta": {"iter": 20000, "CLASSES": NAMES},
        "state_dict": tiny.zegclip_state_dict(SIZES),
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
    }
    torch.save(content, path)
    return path


def imported(architecture, checkpoint, out, *options):
    call = ("import-checkpoint", architecture, checkpoint, "--out", out)
    return run(*call, "--precision", "float32", *options)


def error_of(capsys, *arguments):
    """The line of an import that fails."""
    assert imported(*arguments) in (1, 2)
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("zsseg-rt: ")]
    return line


def without_torch(architecture, checkpoint, out, *options):
    """Output of an import in a process that has neither torch nor the package onnx, and bundle."""
    call = ("import-checkpoint", architecture, checkpoint, "--out", out, "--precision", "float32")
    program = "import sys; sys.modules.update(torch=None, onnx=None); from zsseg_rt.cli import main"
    done = python("-c", f"{program}; sys.exit(main(sys.argv[1:]))", *call, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, Bundle.load(out)


def assert_agree(bundle, embeds, frame, scores, *, margin, clear_share):
    """Labels are those of a model's scores, but where two classes are as good as equal."""
    with Engine(bundle, EngineConfig(device="cpu", precision="float32", use_cache=False)) as engine:
        engine.set_classes(NAMES, embeddings=embeds)
        labels = engine.segment(frame).labels
    ranked = np.sort(scores, axis=0)
    clear = ranked[-1] - ranked[-2] > margin
    assert clear.mean() > clear_share
    assert (labels == scores.argmax(0))[clear].all()


def test_an_imported_zegclip_agrees_with_the_model(checkpoint, tmp_path):
    classes = ("--classes", ",".join(NAMES), "--seen", "road,car")
    _, bundle = without_torch("zegclip", checkpoint, tmp_path / "zegclip.zsseg", *classes)
    assert bundle.head.seen == ("road", "car")
    assert bundle.head.seen_bias == pytest.approx(0.1)
    model = from_official("zegclip", tiny.zegclip_state_dict(SIZES), seen_classes=(0, 2))
    embeds = tiny.text_embeds(7, 64)
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    normalized = {"mean": bundle.preprocess.mean, "std": bundle.preprocess.std}
    image = reference.preprocess(frame, size_hw=(64, 64), **normalized)
    with torch.inference_mode():
        scores = model.predict(torch.from_numpy(image[None]), embeds)[0].numpy()
    assert_agree(bundle, embeds.numpy(), frame, scores, margin=1e-4, clear_share=0.9)


def test_clip_rc_is_imported(tmp_path, capsys):
    source, out = tmp_path / "official.pth", tmp_path / "a.zsseg"
    torch.save({"state_dict": tiny.clip_rc_state_dict(SIZES)}, source)
    assert imported("clip_rc", source, out, "--self-trained", "--size", "32x80") == 0
    assert "remark" not in capsys.readouterr().out
    bundle = Bundle.load(out)
    assert (bundle.architecture, bundle.preprocess.size_hw) == ("clip_rc", (32, 80))


def test_a_data_set_brings_its_classes_and_its_split(checkpoint, tmp_path, capsys):
    out = tmp_path / "zegclip.zsseg"
    call = ("zegclip", checkpoint, out)
    assert imported(*call, "--dataset", "voc2012") == 0
    head = Bundle.load(out).head
    assert (len(head.seen), head.seen_bias) == (15, pytest.approx(0.1))
    assert head.seen[0] == "aeroplane"
    printed = capsys.readouterr().out
    assert f"reading {checkpoint}" in printed
    assert "writing the graphs" in printed
    assert "remark" not in printed
    assert imported(*call, "--dataset", "voc2012", "--seen", "cat") == 2
    assert imported(*call, "--dataset", "voc2011") == 2
    assert imported(*call, "--classes", "road,car", "--seen", "moon") == 2
    assert "--seen: expected names from --classes, got 'moon'" in capsys.readouterr().err
    assert imported(*call) == 1  # it is there
    assert "remark: without --dataset or --seen" in capsys.readouterr().out


def test_openais_clip_is_fetched_as_fetch_does(checkpoint, tmp_path, monkeypatch, capsys):
    """Without a network it answers at once, and only for a checkpoint that is there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    options = ("--clip", "openai", "--dataset", "voc2012")
    for file in (checkpoint, tmp_path / "absent.pth"):
        message = error_of(capsys, "zegformer", file, tmp_path / "z.zsseg", *options)
        assert ("expected to download" in message) == file.exists()
        assert "zsseg-rt fetch" not in message


def test_dense_export_from_the_command_line(tmp_path, capsys):
    encoder, names_file, rows = tmp_path / "e.onnx", tmp_path / "n.json", tmp_path / "r.npy"
    write_encoder(encoder)
    names, embeds = colour_embeds()
    names_file.write_text(json.dumps(names))
    np.save(rows, embeds)
    out = tmp_path / "dense.zsseg"
    call = ("export", "dense", encoder, "--out", out, "--size", 256, "--mean", "none", "--bank",
            names_file)  # fmt: skip
    assert run(*call, rows) == 0
    assert Bundle.load(out).text_bank.names == names
    assert run(*call, rows, "--overwrite", "--mean", "wat") == 2
    np.save(rows, embeds[:3])
    assert run(*call, rows, "--overwrite") == 1
    assert run(*call, tmp_path / "gone.npy", "--overwrite") == 1
    content = encoder.read_bytes()
    np.save(rows, embeds)
    for broken in (content[: len(content) // 2], content.replace(b"AveragePool", b"AveragePoop")):
        encoder.write_bytes(broken)
        assert run(*call, rows, "--overwrite") == 1
    assert Bundle.load(out).text_bank.names == names
    *others, cut, unheard = capsys.readouterr().err.splitlines()
    assert all(line.startswith("zsseg-rt: ") for line in others)
    assert all(line.startswith(f"zsseg-rt: {encoder}: ") for line in (cut, unheard))


def test_other_checkpoints_are_refused(files, tmp_path, capsys):
    path, out = tmp_path / "model_final.pth", tmp_path / "x.zsseg"
    weights = tiny.rule_state_dict(golden_cat_seg.official_shapes(CAT_SIZES))
    earlier = {key: value for key, value in weights.items() if "upsample" not in key}
    other = {golden_cat_seg.CLIP + "visual.conv1.weight": torch.zeros(32, 3, 14, 14)}
    for architecture, content, message in (
        ("cat_seg", earlier, "upsample"),
        ("cat_seg", weights | other, "CAT-Seg L"),
        ("zegformer", tiny.zegclip_state_dict(),
         "backbone.res2.0.conv1.weight: expected a tensor of 4 axes, as in zegformer"),
        ("zegclip", {"layer.weight": torch.zeros(2, 2)}, "backbone."),
    ):  # fmt: skip
        torch.save({"state_dict": content}, path)
        assert message in error_of(capsys, architecture, path, out)
        assert not out.exists()
    error = error_of(capsys, "zegformer", files / "model_final.pth", out)
    assert "expected CLIP's weights under 'sem_seg_head.predictor.clip_model.'" in error


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
    options = ("--classes", ",".join(NAMES), "--seen", "road,car", "--prompts", "imagenet_select")
    options += ("--clip", files / "ViT-B-16.pt", "--size", "96x64", "--calibration", "0.2")
    checkpoint = files / "model_final.pth"
    _, bundle = without_torch("zegformer", checkpoint, tmp_path / "zegformer.zsseg", *options)
    assert (bundle.family, bundle.head.seen) == ("proposals", ("road", "car"))
    assert bundle.head.seen_bias == pytest.approx(0.2)
    assert bundle.text.templates == SEGMENT_TEMPLATES
    clip = load_clip(files / "ViT-B-16.pt", activation="quick_gelu")
    trained = torch.load(checkpoint, weights_only=True)["model"]
    model = from_official("zegformer", trained, clip=clip, seen_classes=(0, 2), calibration=0.2)
    image = tiny_zegformer.image(96, 64)
    texts = [tiny_zegformer.text_features(salt) for salt in "ab"]
    with torch.inference_mode():
        maps = model([image], *texts, [(96, 64)]).sem_seg[0].numpy()
    frame = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    embeds = np.stack([text.numpy() for text in texts])
    # A flipped mask pixel moves scores by up to 1e-3.
    assert_agree(bundle, embeds, frame, maps, margin=2e-4, clear_share=0.8)


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--fusion", "max", "--fusion: expected one of seen_and_unseen, all_classes, regions"),
    ("--prompts", "long", "--prompts: expected one of single, imagenet_select, got long"),
    ("--size", "100", "--size: expected multiples of 32"),
    ("--region-style", "box", "--region-style: expected one of cropmask, mask, crop"),
    ("--clip", "gone.pt", "gone.pt"),
])  # fmt: skip
def test_wrong_options_of_zegformer_are_refused(files, tmp_path, capsys, option, value, message):
    file, out = files / "model_eval.pth", tmp_path / "x.zsseg"
    assert message in error_of(capsys, "zegformer", file, out, option, value)
    assert not out.exists()


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
    whole = {key: weight for key, weight in split.items() if "_proj_weight" not in key}
    for key in split.keys() - whole.keys():
        stem = key[: -len("q_proj_weight")]
        parts = [split[f"{stem}{letter}_proj_weight"] for letter in "qkv"]
        whole[f"{stem}in_proj_weight"] = torch.cat(parts)
    return whole


def test_a_checkpoint_beside_its_clip_says_what_is_equal_bit_for_bit(folder, tmp_path):
    call = (folder / "model_base.pth", tmp_path / "x.zsseg", "--clip", folder / "ViT-B-16.pt")
    said, bundle = without_torch("cat_seg", *call)
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
    call = (folder / "model_base.pth", tmp_path / "x.zsseg")
    error = error_of(capsys, "cat_seg", *call, "--clip", tmp_path / "other.safetensors")
    assert error.startswith("zsseg-rt: --clip: expected")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors"]
