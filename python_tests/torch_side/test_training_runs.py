"""Every family from its settings to a trained model, figures and a bundle, on tiny scenes."""

import hashlib
import inspect
import json
import math
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate")

from support import tiny, tiny_zegformer
from support.errors import refused
from support.small_runs import SIZES, STUDENT, TABLES, photo
from support.toy_training import alike
from tools.scenes.words import CLASS_NAMES, SEEN
from tools.studies.compare_systems import Comparison
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.cli import main
from zsseg_rt.common.schema import encode, setting_names
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError, VocabularyError
from zsseg_rt.models.cat_seg.model import AggregatorConfig, ClassAttention
from zsseg_rt.models.registry import find_builder
from zsseg_rt.torch_files.clip_arrays import OPENAI_FILES
from zsseg_rt.training.assembly import assemble, build_augmentation, build_model, text_space, train
from zsseg_rt.training.class_embeddings import class_embeddings, embed_phrases
from zsseg_rt.training.config import (
    DataConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
    list_recipes,
)
from zsseg_rt.training.loop.checkpointing import read_checkpoint
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.tasks.zegformer import SegmentWeights
from zsseg_rt.training.tasks.zeroseg import TeacherFeatures, TeacherViews, ZeroSegTask
from zsseg_rt.training.trained import load_classes, load_trained, trained_segmenter

HEAD = {"hidden": 32, "num_heads": 2, "window": 2, "text_guidance": 8, "guidance": 8}
DECODER = {"decoder": [32, 16], "up": [8, 8], "decoder_guidance": [8, 8], "padding": 32}
ZEGFORMER = {
    "backbone": {"stem_width": 8, "widths": [4, 4, 4, 8], "depths": [1, 1, 1, 1]},
    "decoder": {"conv_dim": 32, "mask_dim": 16, "hidden_dim": 32, "num_layers": 2},
    "queries": 6,
}
SYSTEMS = {  # the model's options, those of its task, what may move and what must
    "zegclip": ({"num_prompts": 2}, {}, r".*prompt.*|decode_head\..*", {"decode_head.q_proj."}),
    "clip_rc": ({"num_prompts": 2, "num_cells": 4}, {}, ".*", {"decode_head."}),
    "cosine_head": ({}, {}, ".*", {"image_encoder.head."}),
    "zegformer": (
        ZEGFORMER,
        {"learning_rate": 1e-3, "backbone_factor": 1.0},
        r"(?!sem_seg_head\.predictor\.clip_model\.|text_encoder\.).*",
        {"backbone.stem.conv1.norm."},
    ),
    "zeroseg": (
        STUDENT,
        {"views": {"grids": [1, 2], "size": 64}, "base_learning_rate": 0.01},
        r"(?!text_encoder\.).*",
        {"encoder.patch_embed."},
    ),
    "cat_seg": (
        {"pretrained": "demo", "view": 64, "aggregator": HEAD | DECODER},
        {"learning_rate": 1e-2, "backbone_learning_rate": 1e-2},
        r".*_encoder\..*[qv]_proj_weight|(?!.*_encoder\.).*",
        {"image_encoder.", "text_encoder.", "aggregator.conv1.", "upsample1."},
    ),
}


ROOT = Path(__file__).parents[2]
# Whose exports other tests show.
OTHERS = [pytest.param(n, marks=pytest.mark.nightly) for n in ("clip_rc", "cosine_head", "cat_seg")]


def configure(system, clip_file, folder, **tables):
    options, task, *_ = SYSTEMS[system]
    if system != "cat_seg":
        own = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64}
        options = own | options
    text = {"templates": ["a {}."], "region_templates": ["the {}", "one {}"]}
    plain = {
        "model": {"architecture": system, "options": options},
        "text": text if system == "zegformer" else {},
        "task": {"options": task},
        "evaluation": {"limit": 2},
        "output": {"folder": str(folder)},
    }
    return TrainConfig.from_dict(TABLES | plain | tables)


def changed(config, folder, *changes):
    (folder / "given.toml").write_text(config.to_toml())
    return TrainConfig.load(folder / "given.toml", changes)


@pytest.fixture(scope="module")
def run(clip_file, tmp_path_factory):
    @cache
    def run_of(system):
        config = configure(system, clip_file, tmp_path_factory.mktemp(system) / "run")
        return config, train(config)

    return run_of


@pytest.mark.parametrize("system", SYSTEMS)
def test_run_moves_what_it_should_is_judged_and_loads(run, system):
    config, result = run(system)
    assert result.finished
    assert {"pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "mIoU", "top class"} >= result.metrics.keys()
    assert np.isfinite(result.metrics["mIoU"])
    before = assemble(config).task.model.state_dict()
    after = read_checkpoint(result.last_checkpoint).model
    model = load_trained(result.last_checkpoint)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    if system == "zegclip":
        assert model.config.seen_classes == tuple(SEEN)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    _, _, may, must = SYSTEMS[system]
    assert [key for key in moved if not re.fullmatch(may, key)] == []
    assert [start for start in must if not any(key.startswith(start) for key in moved)] == []


@pytest.mark.parametrize("system", ["zegclip", "zegformer", "zeroseg", *OTHERS])
def test_run_exports_to_a_bundle_that_labels_alike(run, tmp_path, system):
    config, result = run(system)
    classes, embeds = load_classes(result.run_folder)
    assert classes.names == tuple(CLASS_NAMES)
    bundle = tmp_path / "run.zsseg"
    arguments = [str(result.run_folder), "--out", str(bundle), "--precision", "float32"]
    assert main(["export", "trained", *arguments]) == 0
    segmenter = trained_segmenter(result.run_folder, classes.names, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Engine(bundle, EngineConfig(precision="float32")) as engine:
        vocabulary = engine.set_classes(list(classes.phrases))
        np.testing.assert_allclose(vocabulary.embeds, embeds, atol=1e-5)
        assert vocabulary.space == classes.space
        if system != "cat_seg":
            digest = hashlib.sha256(Path(config.model.options["pretrained"]).read_bytes())
            space = f"CLIP tiny.safetensors (SHA-256 {digest.hexdigest()[:12]})"
            assert engine.bundle.text.space == space
        labels = engine.segment(image).labels
        if system == "zegclip":
            assert engine.bundle.head.seen == classes.lowered_phrases
    if system != "cat_seg":  # of which most classes score alike after two steps
        assert (labels == segmenter.segment(image)).mean() > 0.99


def test_resuming_needs_the_same_settings(run, tmp_path):
    config, result = run("zegclip")
    path = tmp_path / "given.toml"
    path.write_text(config.to_toml())
    again = train(TrainConfig.load(path, ["loop.log_interval=1", "text.space=mine"]), resume=True)
    assert again.step == 2
    with refused(ArgumentError, "config", "loop.iterations", "loop.seed"):
        train(TrainConfig.load(path, ["loop.seed=1", "loop.iterations=8"]), resume=True)
    with refused(ArgumentError, "output.folder", "--resume"):
        train(TrainConfig.load(path))
    assert TrainConfig.load(result.run_folder / "config.toml").loop.iterations == 2


def test_self_training_starts_from_a_run(run, tmp_path):
    config, result = run("zegclip")
    start_from = f"model={{start_from = '{result.run_folder}'}}"
    changes = ["task.protocol=transductive", f"output.folder={tmp_path}", "evaluation.split="]
    config = changed(config, tmp_path, start_from, *changes)
    start = assemble(config).task.model
    weights = load_trained(result.run_folder).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in start.state_dict().items())
    assert start.config.self_trained
    assert text_space(config.text, config.model).startswith("CLIP tiny.safetensors (SHA-256 ")
    trained = train(config)
    assert load_trained(tmp_path).config.self_trained
    assert trained.metrics == {}


def test_official_checkpoints_start_a_run_as_they_were_saved(tmp_path):
    state_dict = tiny.zegclip_state_dict(SIZES)
    saved = {f"module.{key}": value.half() for key, value in state_dict.items()}
    torch.save({"state_dict": saved}, tmp_path / "official.pth")
    start, options = str(tmp_path / "official.pth"), dict(tiny.zegclip_config(SIZES))
    del options["seen_classes"]
    config = ModelConfig(start_from=start, options=options)
    weights = build_model(config, seen=(0,), protocol="inductive").state_dict()
    assert all(torch.equal(value, state_dict[k].half().float()) for k, value in weights.items())
    clip = ModelConfig(start_from=start, options={"clip": "ViT-B-16"})
    with refused(ArgumentError, "model.options", "'clip'"):
        build_model(clip, seen=(0,), protocol="inductive")


def test_zeroseg_trains_on_photos_without_masks(clip_file, tmp_path):
    for name in ("train/n01/a.jpg", "train/n02/b.JPEG", "val/c.jpg"):
        photo(tmp_path / "photos" / name, (80, 100))
    options = STUDENT | {"embed_dim": 32, "image_size": 64}
    views = {"teacher_activation": "quick_gelu", "views": {"grids": [1, 2], "size": 64}}
    tables = {
        "data": TABLES["data"]
        | {"name": "photos", "root": str(tmp_path / "photos"), "split": "train"},
        "model": {"architecture": "zeroseg", "options": options},
        "task": {"options": views},
    }
    config = configure("zeroseg", clip_file, tmp_path / "run", **tables)
    changes = ["evaluation.split=", f"task.options.teacher={clip_file}"]
    for edits, argument in (([], "evaluation.split"), (changes[:1], "task.options.teacher")):
        with refused(ArgumentError, argument):
            assemble(changed(config, tmp_path, *edits))
    for protocol in ("supervised", "transductive"):
        with refused(ArgumentError, "task.protocol", "'inductive'"):
            assemble(changed(config, tmp_path, *changes, f"task.protocol={protocol}"))
    result = train(changed(config, tmp_path, *changes))
    assert result.losses.keys() == {"reconstruction", "views", "segments"}
    assert load_trained(tmp_path / "run").config.grid_side == 4
    assert load_classes(tmp_path / "run") is None
    with refused(ArgumentError, "data.name"):
        assemble(configure("zegclip", clip_file, tmp_path, data=tables["data"]))
    nothing = type("Nothing", (list,), {"name": "nothing"})()
    with refused(DatasetError, "data", "nothing"):
        assemble(TrainConfig.from_dict(TABLES), dataset=nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loop.iteration=3", r"loop: unknown key 'iteration'. Did you mean 'iterations'\?"),
        ("lop.iterations=3", r"unknown key 'lop'. Did you mean 'loop'\?"),
        ("loop.batch_size=many", "loop.batch_size: expected an integer, got 'many'"),
        ("text.templates=['a', 1]", r"text.templates\[1\]: expected a string, got 1"),
        ("schedule.name=step", "schedule.name: expected one of poly, cosine, constant"),
        ("schedule.warmup_steps=9", "warmup_steps"),
        ("nonsense", "--set: expected table.key=value"),
        ("model={}", r"^model.options.pretrained"),
        ("model.options.pretrained=3", r"^model.options.pretrained"),
        ("model.options.pretrained=absent.pt", r"^model.options.pretrained"),
        ("model.options.pretrained=opnai", r"^model.options.pretrained"),
        ("model.options={pretrained='CLIP'}", r"^model.options.activation"),
        ("model.options={pretrained='absent.pt', activation='relu'}", r"^model.options.activation"),
        ("model.options={pretrained='absent.pt', image_size='9'}", r"^model.options.image_size"),
        ("model.options.start=picture", r"^model.options.start"),
        ("model.options.num_promts=3", r"model.options: unknown key 'num_promts'. Did you mean"),
        ("model.options.seen_classes=[1]", "model.options: unknown key 'seen_classes'"),
        ("text.clip=absent.pt", r"^text.clip"),
        ("text.clip=CLIP", r"^text.clip_activation"),
        ("task.options.focal_weight=-1", r"^task.options.focal_weight"),
        ("task.options.focal_wieght=3", r"task.options: unknown key 'focal_wieght'. Did you mean"),
        ("data.name=folders", "name: expected one of .*folder"),
        ("data.augmentation.kind=blur", "data.augmentation.kind: expected one of fit_inside"),
        ("data.augmentation.crop=3", r"data.augmentation: unknown key 'crop'"),
        ("evaluation.options={valuse = [1]}", "valuse"),
        ("loop.best_metric=hIuO", r"loop.best_metric: expected one of pAcc, .*got 'hIuO'"),
    ],
)
def test_wrong_settings_are_named(change, message, clip_file, tmp_path):
    config = configure("zegclip", clip_file, tmp_path)
    with pytest.raises((ArgumentError, CheckpointError), match=message):
        assemble(changed(config, tmp_path, change.replace("CLIP", clip_file)))


def test_a_failed_download_and_a_teacher_name_the_setting(clip_file, tmp_path, monkeypatch, capsys):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", Mock(side_effect=OSError("no route to host")))
    with refused(CheckpointError, "model.options.pretrained"):
        assemble(configure("cosine_head", "openai", tmp_path))
    for teacher, argument in (("absent.pt", "teacher"), (clip_file, "teacher_activation")):
        options = {"options": {"teacher": teacher}}
        with refused(CheckpointError, f"task.options.{argument}"):
            assemble(configure("zeroseg", clip_file, tmp_path, task=options))
    call = ["export", "zeroseg", "absent.safetensors", "--text", "absent.pt"]
    assert main([*call, "--out", str(tmp_path / "x.zsseg")]) == 1
    assert capsys.readouterr().err.startswith("zsseg-rt: --text: expected a CLIP file")


def test_crops_follow_the_size_of_the_model_unless_they_are_given(clip_file, tmp_path):
    data = {**TABLES["data"], "augmentation": {"flip_probability": 0}}
    config = configure("zegclip", clip_file, tmp_path, data=data)
    parts = assemble(config)
    wanted = {"crop_hw": [64, 64], "scale": [256, 64], "flip_probability": 0}
    assert parts.config.data.augmentation == wanted  # what is saved with the run
    place = {"start_position": 0, "process_index": 0, "num_processes": 1, "batch_size": 2}
    assert next(parts.batches(**place)).images.shape == (2, 3, 64, 64)
    cropped = changed(config, tmp_path, "data.augmentation={crop_hw = [96, 80], scale = [80, 64]}")
    kept = {"crop_hw": [96, 80], "scale": [80, 64]}
    assert assemble(cropped).config.data.augmentation == kept


# --- whose space a run's embeddings live in ---


OPENAI = {"options": {"pretrained": "openai"}}


@pytest.mark.parametrize(
    ("text", "model", "space"),
    [
        ({"clip": "openai", "clip_architecture": "RN50"}, OPENAI, "OpenAI CLIP RN50"),
        ({}, {"options": {"pretrained": "openai", "clip": "ViT-B-16-quickgelu"}},
         "OpenAI CLIP ViT-B/16"),
        ({}, {"options": {"pretrained": "openai", "clip": "ViT-L-14-336"}},
         "OpenAI CLIP ViT-L/14@336px"),
        ({"clip": "laion2b_s34b_b88k"}, OPENAI, "CLIP ViT-B-16 laion2b_s34b_b88k"),
        ({"bank": "rows.npy", "clip": "openai", "space": "mine"}, OPENAI, "mine"),
        ({"bank": "rows.npy", "clip": "openai"}, OPENAI, "rows of rows.npy (SHA-256 "),
        ({}, OPENAI, "OpenAI CLIP ViT-B/16"),
        ({}, {"architecture": "zeroseg"} | OPENAI, "OpenAI CLIP ViT-L/14"),
        ({}, {}, ""),
        ({"clip": "weights.pt"}, {}, "OpenAI CLIP ViT-B/16"),  # by its hash
    ],
)  # fmt: skip
def test_what_is_stated_counts_first_then_the_bank_then_the_clip(
    text, model, space, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("rows.npy").write_bytes(b"rows")
    Path("weights.pt").write_bytes(b"CLIP")
    monkeypatch.setitem(OPENAI_FILES, hashlib.sha256(b"CLIP").hexdigest(), "ViT-B-16")
    name = text_space(TextConfig(**text), ModelConfig(**model))
    assert name.startswith(space)
    assert name == space or space.endswith(" ")


def test_names_go_through_the_tuned_tower_at_every_step_and_checkpoints_hold_them(run):
    config, result = run("cat_seg")
    classes, embeds = load_classes(result.run_folder)
    model = load_trained(result.run_folder)
    own = embed_phrases(model.text_encoder, classes.phrases, classes.templates)
    torch.testing.assert_close(embeds, own)
    parts = assemble(config)  # before training
    assert (embeds - parts.embeddings.phrase_embeds).abs().max() > 1e-2
    assert "own text tower" in classes.space
    task, model = parts.task, parts.task.model
    rows = parts.embeddings.class_embeds[task.label_protocol.query_rows]
    torch.testing.assert_close(task.queries().detach(), rows, atol=1e-5, rtol=1e-4)
    task.queries()[0, 0].backward()
    grads = {name for name, p in model.text_encoder.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in model.text_encoder.named_parameters() if p.requires_grad}


def test_names_from_a_bank_leave_the_text_tower_and_bad_settings_are_refused(tmp_path):
    bank = tmp_path / "rows.npy"
    np.save(bank, np.eye(28, 128, dtype=np.float32))
    task = assemble(configure("cat_seg", "demo", tmp_path, text={"bank": str(bank)})).task
    assert not any(p.requires_grad for p in task.model.text_encoder.parameters())
    assert torch.equal(task.queries(), task.query_embeds)
    frozen = {"options": {"backbone_learning_rate": 0.0}}  # and without a rate all of CLIP
    task = assemble(configure("cat_seg", "demo", tmp_path, task=frozen)).task
    assert (task.tunes_text, len(task.parameter_groups())) == (False, 1)
    for setting, value in (("backbone_learning_rate", -1.0), ("pooling", 3), ("pooling", 0)):
        with refused(ArgumentError, setting):
            TASKS["cat_seg"](task.model, torch.ones(28, 128), seen=SEEN, **{setting: value})


@torch.no_grad()
def test_pooling_averages_cells_in_training_alone():
    torch.manual_seed(0)
    sizes = {"hidden": 16, "num_heads": 2, "text_guidance": 8, "decoder_guidance": (8, 8)}
    attention = ClassAttention(AggregatorConfig(**sizes))
    alike = torch.randn(2, 3, 1, 16).expand(-1, -1, 16, -1)
    x, text = torch.randn(2, 3, 16, 16), torch.rand(3, 8)
    plain = attention(alike, text), attention(x, text)
    attention.pooling = 2
    torch.testing.assert_close(attention(alike, text), plain[0])  # means of equals
    assert (attention(x, text) - plain[1]).abs().max() > 1e-2
    assert torch.equal(attention.eval()(x, text), plain[1])
    cells = x.clone().unflatten(2, (4, 4))
    cells[:, :, :2, :2] = cells[:, :, :2, :2].flip(2, 3)  # order within a cell is not seen
    changed = attention.train()(cells.flatten(2, 3), text) - cells.flatten(2, 3)
    torch.testing.assert_close(changed, attention(x, text) - x)


def test_official_zegformer_starts_with_the_clip_that_is_named_or_says_what_to_do(tmp_path):
    weights, prefix = tiny_zegformer.state_dict(), tiny_zegformer.CLIP
    bare = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    clip = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    torch.save({"model": bare, "iteration": 1}, tmp_path / "official.pth")
    save_file(clip, tmp_path / "clip.safetensors")

    def built(seen=(), **options):
        start, options = str(tmp_path / "official.pth"), {"num_heads": 4} | options
        config = ModelConfig(architecture="zegformer", start_from=start, options=options)
        return build_model(config, seen=seen, protocol="inductive")

    named = {"pretrained": str(tmp_path / "clip.safetensors"), "activation": "quick_gelu"}
    model = built((0, 1), **named)
    assert model.config.fusion == "seen_and_unseen"
    assert model.text_encoder is not None
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    message = "official.pth: .*CLIP's weights .*model.options.pretrained is CLIP's file.*fusion"
    with pytest.raises(CheckpointError, match=message):
        built()
    with refused(ArgumentError, "model.options.pretrained"):
        built(activation="gelu")
    for options in ({"ensemble": False}, {"fusion": "segments"}):  # the official flag, our word
        assert built(**options).config.fusion == "segments"


def test_a_run_is_resumed_with_its_teacher_whose_weights_it_does_not_hold(clip_file, tmp_path):
    """As if it had been killed after two of its four steps."""
    path = shutil.copy(clip_file, tmp_path / "teacher.safetensors")
    config = configure("zeroseg", path, tmp_path / "run")
    config = replace(config, loop=replace(config.loop, iterations=4, checkpoint_interval=2))
    last = train(config).last_checkpoint
    last.rename(tmp_path / "uninterrupted")
    checkpoint = last.with_name("step-00000002.pt")
    assert not [name for name in read_checkpoint(checkpoint).task if "teacher" in name]
    first, second = (
        replace(read_checkpoint(path), losses={})  # means since the run began, or went on
        for path in (tmp_path / "uninterrupted", train(config, resume=True).last_checkpoint)
    )
    assert alike(first, second)
    weights = load_file(path)
    save_file(weights | {"visual.proj": weights["visual.proj"] + 1}, path)
    with refused(CheckpointError, None, "features.teacher"):
        train(config, resume=True)
    path.unlink()
    with refused(CheckpointError, "model.options.pretrained", "teacher.safetensors"):
        train(config, resume=True)
    assert load_trained(checkpoint).config.embed_dim == weights["visual.proj"].shape[1]


def test_bank_gives_rows_by_name_and_averages_synonyms_or_is_named(tmp_path):
    rows = tiny.text_embeds(4, 8).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank, names = tmp_path / "rows.npy", tmp_path / "names.txt"
    np.save(bank, 3 * rows)  # of any norm
    whole = bank.read_bytes()
    names.write_text("Tree\ncar\nautomobile\nroad, street\n")
    config = TextConfig(bank=str(bank), bank_names=str(names))
    embeddings = class_embeddings(["car, automobile", "tree", "road, street"], config)
    assert embeddings.phrases == ("car", "automobile", "tree", "road", "street")
    np.testing.assert_allclose(embeddings.phrase_embeds, rows[[1, 2, 0, 3, 3]], atol=1e-6)
    mean = rows[1] + rows[2]
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(embeddings.class_embeds[0], expected, atol=1e-6)
    with refused(VocabularyError, "text.bank"):
        class_embeddings(["car", "boat"], config)
    np.save(bank, [["a"]])
    with refused(ArgumentError, "text.bank"):
        class_embeddings(["car"], config)
    bank.write_bytes(whole[:-1])
    with refused(ArgumentError, "text.bank"):
        class_embeddings(["car"], config)
    bank.write_bytes(whole)
    names.write_text("[" * 100_000)
    with pytest.raises(ArgumentError, match=r"names\.txt: expected"):
        class_embeddings(["car"], config)
    with refused(ArgumentError, "text", "text.bank", "text.clip"):
        class_embeddings(["car"], TextConfig())
    with refused(CheckpointError, None, tmp_path.name):
        load_trained(tmp_path)


def test_every_hint_is_for_an_extra_that_there_is():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    files = (*(ROOT / "zsseg_rt").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert "zsseg_rt[" not in text
    calls = " ".join(re.findall(r"install_command\(([^)]*)\)", text))
    hint = r"needs_extra\(\"(\w+)\"|pip install '\.\[(\w+)\]'"
    named = {*re.findall(r"[\"'](\w+)[\"']", calls), *map("".join, re.findall(hint, text))}
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    assert {"train", "opencv", "tensorrt", "data"} <= named <= extras


# --- recipes, TOML, options and schedules, and their page ---


def test_recipes_are_as_they_were():
    """A change of a recipe, or of a default that one relies on, is meant: renew the digest."""
    plain = encode(TrainConfig(data=DataConfig(name="")))
    settings = {
        f"{recipe} {table}.{key}": value
        for recipe in list_recipes()
        for table, fields in encode(TrainConfig.load(recipe)).items()
        for key, value in fields.items()
        if value != plain[table][key]
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert digest[:12] == "d317f49e628b"


def test_a_file_of_ones_own_is_laid_over_a_recipe(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('base = "zegclip_voc_inductive"\n[data]\nname = "folder"\n[loop]\nseed = 3\n')
    config, base = TrainConfig.load(path), TrainConfig.load("zegclip_voc_inductive")
    assert config.differences(base) == ["data.name", "loop.seed"]
    assert config == TrainConfig.load(path.rename(tmp_path / "zegclip_voc_inductive"))
    for wrong in ('"zegclip"', '"own.toml"', "3", "[]"):
        path.write_text(f"base = {wrong}\n[data]\nname = 'folder'\n")
        with pytest.raises(ArgumentError, match="base: expected one of the recipes"):
            TrainConfig.load(path)
    for source in ("a" * 5000, "a" * 5000 + ".toml", "a\0b", "/", "zegclip_vok", "missing.toml"):
        with pytest.raises(ArgumentError, match=r"cannot be read|expected a TOML file or one of"):
            TrainConfig.load(source)


@pytest.mark.parametrize("recipe", list_recipes())
def test_recipes_are_complete_and_name_what_exists(recipe):
    config = TrainConfig.load(recipe)
    assert config.output.folder == f"runs/{recipe}"
    assert config.schedule.factor(config.loop.iterations // 2, config.loop.iterations) > 0
    build_augmentation(config.data.augmentation)
    if recipe == "demo":
        return
    with pytest.raises(DatasetError, match="nowhere"):
        TrainConfig.load(recipe, ["data.root=nowhere"]).open_data("training")
    if not config.model.start_from:
        builder = inspect.signature(find_builder(config.model.architecture, official=False))
        builder.bind(**config.model.options)
    kind = TASKS[config.model.architecture]
    features = {"teacher", "teacher_architecture", "views"} if kind is ZeroSegTask else set()
    assert config.task.options.keys() <= {*setting_names(kind), *features}


DATA = '[data]\nname = "folder"\n'
STRANGE = {
    "lists": "[" * 5000 + "]" * 5000,
    "tables": "{a = " * 400 + "1" + "}" * 400,
    "dots": f"{{ {'.'.join('a' * 5000)} = 1 }}",
    "hour": "[[04:05:06]]",
    "digits": "9" * 5000,
    "nan": "nan",
    "half of a letter": '"\udcff"',
}


@pytest.fixture
def config_path(tmp_path):
    """A file that names its data alone."""
    (tmp_path / "a.toml").write_text(DATA)
    return tmp_path / "a.toml"


@pytest.mark.parametrize("name", STRANGE)
def test_strange_values_are_refused(config_path, name):
    value = STRANGE[name]
    for change in (f"model.options.pretrained={value}", "a" * 5000):
        with pytest.raises(ArgumentError, match="--set") as caught:
            TrainConfig.load(config_path, [change])
        assert len(str(caught.value)) < 300
    text = f"{DATA}[model.options]\npretrained = {value}\n"
    config_path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for kind in (TrainConfig, Comparison):
        with pytest.raises(ArgumentError, match=r"a\.toml: (expected .*|cannot be read)"):
            kind.load(config_path)


def test_settings_survive_being_written(config_path, tmp_path):
    texts = ("a\\u007fb", "\\r\\n", "\\u0085", '\\"', "\\u0000", "😀")
    options = ", ".join(f'"{text}" = ["{text}"]' for text in texts)
    changes = [f"model.options={{ {options} }}", "task.options.deep=[[[[1, 2.5], [true]], 'a']]"]
    config = TrainConfig.load(config_path, [*changes, 'text.templates=["a \\"{}\\"", "{} é"]'])
    (tmp_path / "b.toml").write_text(config.to_toml(), encoding="utf-8")
    again = TrainConfig.load(tmp_path / "b.toml")
    assert again == config != TrainConfig.load(config_path)
    assert not config.differences(again)


@pytest.mark.parametrize(
    ("architecture", "row", "more"),
    [
        ("zegclip", "ZegCLIP, CLIP-RC", []),
        ("clip_rc", "ZegCLIP, CLIP-RC", []),
        ("cosine_head", "cosine head", []),
        ("cat_seg", "CAT-Seg", []),
        ("zegformer", "ZegFormer", [SegmentWeights]),
        ("zeroseg", "ZeroSeg", [TeacherFeatures, TeacherViews]),
    ],
)
def test_every_option_of_models_and_tasks_is_on_the_page(architecture, row, more):
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^- \*\*(.*?)\*\*: (.*(?:\n  .*)*)$", page, re.MULTILINE)

    def named(*starts):
        texts = [text for name, text in rows if name.startswith(starts)]
        return set(re.findall(r"`(\w+)`", " ".join(texts)))

    taken = {name for taker in (TASKS[architecture], *more) for name in setting_names(taker)}
    if architecture == "zeroseg":
        taken |= {"teacher", "teacher_architecture", "teacher_activation", "views"}
    else:
        options = set(setting_names(find_builder(architecture, official=False)))
        missing = options - named("all that start", "`zegclip`", f"`{architecture}`")
        assert missing == {"seen_classes", "self_trained"} & options
    inner = {"seen", "ignore_label", "protocol", "batch_size", "num_images", "prompts"}
    assert named(row) == taken - inner


def test_the_official_learning_rate(shared_dir):
    golden = json.loads((shared_dir / "golden" / "zs_lr_schedule.json").read_text())
    for max_steps, rates in golden.items():
        for step, rate in rates.items():
            rates = ScheduleConfig(warmup_steps=1500, min_factor=0.005)
            # float64: the factor is rounded before the multiplication, not after
            factor = rates.factor(int(step), int(max_steps))
            assert 2e-4 * factor == pytest.approx(rate, rel=1e-14, abs=0)


def test_schedules():
    def factors(name, count, iterations, **settings):
        schedule = ScheduleConfig(name=name, **settings)
        return [schedule.factor(step, iterations) for step in range(count)]

    poly = [(1 - step / 10) ** 0.9 for step in range(11)] + [0]
    assert factors("poly", 12, 10) == pytest.approx(poly)
    assert factors("poly", 3, 9, power=0.0, warmup_steps=2, warmup_start=0.0) == [0, 0.5, 1]
    cosine = factors("cosine", 14, 12, warmup_steps=4, min_factor=0.1)
    assert cosine[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert cosine[4:13] == pytest.approx(expected)
    assert cosine[13] == cosine[12] == pytest.approx(0.1)
    assert factors("constant", 3, 2, warmup_steps=1, warmup_start=0.5) == [0.5, 1, 1]
    for settings, argument in (
        ({"warmup_steps": 5}, "warmup_steps"),
        ({"min_factor": 1.5}, "min_factor"),
        ({"name": "cosine", "power": 0.5}, "power"),
        ({"name": "constant", "min_factor": 0.5}, "min_factor"),
    ):
        with refused(ArgumentError, argument):
            ScheduleConfig(**settings).factor(0, 5)
