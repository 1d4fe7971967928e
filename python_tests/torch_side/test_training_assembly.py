"""From a TOML file to a trained model, an evaluation and a bundle; on a synthetic world."""

import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")


from support import tiny  # noqa: E402
from support.errors import refused  # noqa: E402
from support.small_runs import SCENES, SIZES, save_clip  # noqa: E402
from tools.scenes.words import CLASS_NAMES, SEEN  # noqa: E402
from zsseg_rt.cli import main  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError, VocabularyError  # noqa: E402
from zsseg_rt.training.assembly import assemble, train  # noqa: E402
from zsseg_rt.training.class_embeddings import class_embeddings  # noqa: E402
from zsseg_rt.training.config import ModelConfig, TextConfig, TrainConfig  # noqa: E402
from zsseg_rt.training.loop.checkpointing import read_checkpoint  # noqa: E402
from zsseg_rt.training.parts import build_model  # noqa: E402
from zsseg_rt.training.trained.card import (  # noqa: E402
    describe_model,
    load_classes,
    load_trained,
)

ZEROSEG_SIZES = """
    width = 32
    num_layers = 1
    num_heads = 2
    grid_side = 4
    decoder_width = 16
    decoder_layers = 1
    decoder_heads = 2
    head_width = 32
    head_heads = 2
    group_tokens = [4, 2]
    embed_dim = 32
    projection_width = 32
"""


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors")


def unit_rows(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def toml(clip_file, folder, extra=""):
    return f"""
    [data]
    name = "folder"
    root = "{SCENES}"
    [data.augmentation]
    crop_hw = [64, 64]
    scale = [80, 64]
    [model]
    architecture = "zegclip"
    [model.options]
    pretrained = "{clip_file}"
    activation = "quick_gelu"
    num_prompts = 2
    image_size = 64
    [loop]
    iterations = 4
    batch_size = 2
    checkpoint_interval = 2
    log_interval = 1
    num_workers = 0
    num_pictures = 1
    device = "cpu"
    deterministic = true
    [evaluation]
    limit = 2
    [output]
    folder = "{folder}"
    {extra}
    """


@pytest.fixture(scope="module")
def run(clip_file, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "zegclip"
    path = folder.parent / "run.toml"
    path.write_text(toml(clip_file, folder))
    return train(TrainConfig.load(path)), path


def test_run_can_be_loaded_and_exported(run, tmp_path):
    from zsseg_rt import Engine

    result, _ = run
    assert result.finished
    assert set(result.metrics) <= {"pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "mIoU", "top class"}
    model = load_trained(result.run_folder)
    weights = read_checkpoint(result.best_checkpoint).model
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.config.seen_classes == tuple(SEEN)
    classes, embeds = load_classes(result.run_folder)
    assert classes.names == tuple(CLASS_NAMES)
    bundle = tmp_path / "run.zsseg"
    arguments = [str(result.run_folder), "--out", str(bundle), "--precision", "float32"]
    assert main(["export", "trained", *arguments]) == 0
    with Engine(bundle) as engine:
        engine.set_classes(list(classes.phrases))
        np.testing.assert_allclose(engine.vocabulary.embeds, embeds, atol=1e-5)
        labels = engine.segment(np.zeros((64, 64, 3), np.uint8)).labels
    assert labels.shape == (64, 64)
    assert engine.bundle.head.seen == classes.seen_phrases


def test_training_moves_what_it_should_and_nothing_else(run, clip_file):
    before = assemble(TrainConfig.load(run[1])).task.model.state_dict()
    after = load_trained(run[0].run_folder).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "backbone.prompt_embeddings" in moved
    assert "decode_head.q_proj.weight" in moved
    assert not {key for key in moved if "prompt" not in key and not key.startswith("decode_head")}


def test_resuming_needs_the_same_settings(run):
    result, path = run
    again = train(TrainConfig.load(path, ["loop.num_workers=0"]), resume=True)
    assert again.step == 4
    with refused(ArgumentError, "config", "loop.iterations", "loop.seed"):
        train(TrainConfig.load(path, ["loop.seed=1", "loop.iterations=8"]), resume=True)
    with refused(ArgumentError, "output.folder", "--resume"):
        train(TrainConfig.load(path))
    assert TrainConfig.load(result.run_folder / "config.toml").loop.iterations == 4


def test_self_training_starts_from_a_run(run, tmp_path):
    result, path = run
    changes = [
        f"model={{start_from = '{result.run_folder}'}}",
        "task.protocol=transductive",
        f"output.folder={tmp_path}",
        "loop.iterations=1",
        "evaluation.split=",
    ]
    config = TrainConfig.load(path, changes)
    start = assemble(config).task.model
    weights = load_trained(result.run_folder).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in start.state_dict().items())
    assert start.config.self_trained
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


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("clip_rc", "num_prompts = 2\nnum_cells = 4\nimage_size = 64"),
        ("cosine_head", "image_size = 64"),
    ],
)
def test_other_families_train_and_load(architecture, options, clip_file, tmp_path):
    path = tmp_path / "run.toml"
    text = toml(clip_file, tmp_path / "run").replace('"zegclip"', f'"{architecture}"')
    path.write_text(text.replace("num_prompts = 2\n    image_size = 64", options))
    config = TrainConfig.load(path, ["loop.iterations=1"])
    before = assemble(config).task.model.state_dict()
    result = train(config)
    model = load_trained(tmp_path / "run")
    weights = read_checkpoint(result.last_checkpoint).model
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in weights.items())
    assert np.isfinite(result.metrics["mIoU"])


def test_a_run_of_an_earlier_version_is_known_by_its_old_name(clip_file, tmp_path, monkeypatch):
    def described(model, classes):
        return describe_model(model, classes) | {"architecture": "dense_baseline"}

    monkeypatch.setattr("zsseg_rt.training.assembly.describe_model", described)
    path = tmp_path / "run.toml"
    text = toml(clip_file, tmp_path / "run").replace('"zegclip"', '"cosine_head"')
    path.write_text(text.replace("num_prompts = 2\n", ""))
    train(TrainConfig.load(path, ["loop.iterations=1", "evaluation.split="]))
    assert load_trained(tmp_path / "run").architecture == "cosine_head"


def test_zeroseg_trains_without_classes(clip_file, tmp_path):
    path = tmp_path / "run.toml"
    text = toml(clip_file, tmp_path / "run").replace('"zegclip"', '"zeroseg"')
    start, end = text.index("[model.options]"), text.index("[loop]")
    student = """[model.options]
    image_size = 64
    STUDENT
    [task.options]
    teacher_activation = "quick_gelu"
    views = { grids = [1, 2], size = 64 }
    """
    path.write_text(text[:start] + student.replace("STUDENT", ZEROSEG_SIZES) + text[end:])
    with refused(ArgumentError, "evaluation.split"):
        assemble(TrainConfig.load(path))
    with refused(ArgumentError, "task.options.teacher"):
        assemble(TrainConfig.load(path, ["evaluation.split="]))
    changes = ["evaluation.split=", f"task.options.teacher={clip_file}", "loop.iterations=1"]
    with refused(ArgumentError, "task.protocol", "'inductive'"):
        assemble(TrainConfig.load(path, [*changes, "task.protocol=supervised"]))
    result = train(TrainConfig.load(path, changes))
    assert result.losses.keys() == {"reconstruction", "views", "segments"}
    weights = read_checkpoint(result.last_checkpoint).model
    loaded = load_trained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    assert load_classes(tmp_path / "run") is None


def test_command_line_trains(clip_file, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(toml(clip_file, tmp_path / "run"))
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "8 images" in shown
    assert "iterations = 4" in shown
    assert not (tmp_path / "run").exists()
    arguments = ["train", "-c", str(path), "--set", "loop.iterations=2", "--json"]
    assert main([*arguments, str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2
    assert "finished 2 steps" in capsys.readouterr().out
    assert main([*arguments[:3], "--resume", "--set", "loop.seed=3"]) == 1
    assert "loop.seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loop.iteration=3", r"loop: unknown key 'iteration'. Did you mean 'iterations'\?"),
        ("lop.iterations=3", r"unknown key 'lop'. Did you mean 'loop'\?"),
        ("loop.batch_size=many", "loop.batch_size: expected an integer, got 'many'"),
        ("task.protocol=open", "task.protocol: expected one of inductive, transductive"),
        ("schedule.name=step", "schedule.name: expected one of poly, cosine, constant"),
        ("schedule.warmup_steps=9", "warmup_steps"),
        ("nonsense", "--set: expected table.key=value"),
    ],
)
def test_wrong_settings_are_named(change, message, clip_file, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml(clip_file, tmp_path))
    with pytest.raises(ArgumentError, match=message):
        TrainConfig.load(path, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.options.num_promts=3", r"model.options: unknown key 'num_promts'. Did you mean"),
        ("model.options.seen_classes=[1]", "model.options: unknown key 'seen_classes'"),
        ("task.options.focal_wieght=3", r"task.options: unknown key 'focal_wieght'. Did you mean"),
        ("data.name=folders", "name: expected one of .*folder"),
        ("data.augmentation.kind=blur", "data.augmentation.kind: expected one of fit_inside"),
        ("data.augmentation.crop=3", r"data.augmentation: unknown key 'crop'"),
        ("evaluation.options={valuse = [1]}", "valuse"),
        ("loop.best_metric=hIuO", r"loop.best_metric: expected one of pAcc, .*got 'hIuO'"),
    ],
)
def test_wrong_options_are_named(change, message, clip_file, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml(clip_file, tmp_path))
    with pytest.raises(ArgumentError, match=message):
        assemble(TrainConfig.load(path, [change]))


@pytest.mark.parametrize("architecture", ["zegclip", "clip_rc", "cosine_head"])
def test_crops_follow_the_size_of_the_model(architecture, clip_file, tmp_path):
    text = toml(clip_file, tmp_path).replace("crop_hw = [64, 64]", "flip_probability = 0")
    path = tmp_path / "run.toml"
    path.write_text(text.replace("scale = [80, 64]", ""))
    changes = [f"model.architecture={architecture}"]
    if architecture == "cosine_head":
        path.write_text(path.read_text().replace("num_prompts = 2", ""))
    parts = assemble(TrainConfig.load(path, changes))
    wanted = {"crop_hw": [64, 64], "scale": [256, 64], "flip_probability": 0}
    assert parts.config.data.augmentation == wanted  # what is saved with the run
    batch = next(parts.batches(start_position=0, process_index=0, num_processes=1, batch_size=2))
    assert batch.images.shape == (2, 3, 64, 64)


def test_crops_that_are_given_stay(clip_file, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml(clip_file, tmp_path))
    parts = assemble(TrainConfig.load(path, ["data.augmentation.crop_hw=[96, 80]"]))
    assert parts.config.data.augmentation == {"crop_hw": [96, 80], "scale": [80, 64]}


def test_resolved_settings_read_back(clip_file, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml(clip_file, tmp_path, '[text]\ntemplates = ["a \\"{}\\"", "{} é"]'))
    config = TrainConfig.load(path)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(config.to_toml())
    assert TrainConfig.load(resolved) == config


def test_bank_gives_rows_by_name_and_averages_synonyms(tmp_path):
    rows = unit_rows(tiny.text_embeds(4, 8).numpy())
    np.save(tmp_path / "rows.npy", 3 * rows)  # of any norm
    (tmp_path / "names.txt").write_text("Tree\ncar\nautomobile\nroad, street\n")
    config = TextConfig(bank=str(tmp_path / "rows.npy"), bank_names=str(tmp_path / "names.txt"))
    found = class_embeddings(["car, automobile", "tree", "road, street"], config)
    assert found.phrases == ("car", "automobile", "tree", "road", "street")
    np.testing.assert_allclose(found.phrase_embeds, rows[[1, 2, 0, 3, 3]], atol=1e-6)
    mean = unit_rows(rows[1:2] + rows[2:3])
    np.testing.assert_allclose(found.class_embeds[:1], mean, atol=1e-6)
    with refused(VocabularyError, "text.bank"):
        class_embeddings(["car", "boat"], config)


@pytest.mark.parametrize("name", ["header", "cut", "text", "objects", "names", "pipe"])
def test_damaged_banks_are_named(tmp_path, name):
    path, names = tmp_path / "rows.npy", tmp_path / "names.txt"
    np.save(path, unit_rows(tiny.text_embeds(4, 8).numpy()))
    names.write_text("[" * 100_000 if name == "names" else "a\nb\nc\nd\n")
    content = path.read_bytes()
    odd = {"header": content.replace(b"'shape': (4, 8)", b"'shape': (4**8)"), "cut": content[:-1]}
    path.write_bytes(odd.get(name, content))
    if name == "text":
        np.save(path, np.array([["a"]]))
    elif name == "objects":
        np.save(path, np.array([{}], object), allow_pickle=True)
    elif name == "pipe":
        path.unlink()
        os.mkfifo(path)
    config = TextConfig(bank=str(path), bank_names=str(names))
    with pytest.raises(ArgumentError, match=r"(text\.bank|names\.txt): expected"):
        class_embeddings(["a"], config)


def test_no_source_of_embeddings_is_an_error():
    with refused(ArgumentError, "text", "text.bank", "text.clip"):
        class_embeddings(["car"], TextConfig())


def test_text_tower_embeds_as_the_bundle_does(zegclip_model, tmp_path):
    from zsseg_rt.export.options import ExportOptions
    from zsseg_rt.export.text_side import TextSide

    templates = ("a photo of a {}.", "the {}")
    found = class_embeddings(["car", "tree"], TextConfig(templates=templates), zegclip_model)
    options, tower = ExportOptions(templates=templates), zegclip_model.text_encoder
    side = TextSide(options, embed_dim=32, tower=tower)
    side.write_tokenizer(tmp_path)
    expected, _ = side.embed(["car", "tree"])
    np.testing.assert_allclose(found.phrase_embeds, expected, atol=1e-6)


def test_what_is_no_run_is_refused(tmp_path):
    with refused(CheckpointError, None, tmp_path.name):
        load_trained(tmp_path)
