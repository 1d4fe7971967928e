"""ZegFormer and ZeroSeg from settings to a bundle, on the synthetic world."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file  # noqa: E402

from support import tiny_zegformer  # noqa: E402
from support.errors import refused  # noqa: E402
from support.small_runs import TABLES, save_clip  # noqa: E402
from support.toy_training import alike  # noqa: E402
from tools.scenes.folder import as_folder  # noqa: E402
from tools.scenes.words import CLASS_NAMES, SEEN  # noqa: E402
from tools.studies.comparison import Comparison, merge  # noqa: E402
from zsseg_rt import Engine  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError  # noqa: E402
from zsseg_rt.models.zegformer.backbone import LearnedBatchNorm  # noqa: E402
from zsseg_rt.training.assembly import assemble, train  # noqa: E402
from zsseg_rt.training.config import ModelConfig, TrainConfig  # noqa: E402
from zsseg_rt.training.loop.checkpointing import read_checkpoint  # noqa: E402
from zsseg_rt.training.parts import build_model  # noqa: E402
from zsseg_rt.training.trained.card import (  # noqa: E402
    export_trained,
    load_classes,
    load_trained,
)
from zsseg_rt.training.trained.segmenter import trained_segmenter  # noqa: E402

COMMON = {**TABLES, "evaluation": {"limit": 2}}
ZEGFORMER = {
    "backbone": {"stem_width": 8, "widths": [4, 4, 4, 8], "depths": [1, 1, 1, 1]},
    "decoder": {"conv_dim": 32, "mask_dim": 16, "hidden_dim": 32, "num_layers": 2},
    "queries": 6,
}
ZEROSEG = {
    "width": 32,
    "num_layers": 1,
    "num_heads": 2,
    "grid_side": 4,
    "decoder_width": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "head_width": 32,
    "head_heads": 2,
    "group_tokens": [4, 2],
    "projection_width": 32,
}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors")


def configure(architecture, options, clip_file, folder, **tables):
    options = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64} | options
    model = {"architecture": architecture, "options": options}
    return TrainConfig.from_dict(
        COMMON | {"model": model, "output": {"folder": str(folder)}} | tables
    )


def zegformer(clip_file, folder):
    text = {"templates": ["a {}."], "region_templates": ["the {}", "one {}"]}
    task = {"options": {"learning_rate": 1e-3, "backbone_factor": 1.0}}
    return configure("zegformer", ZEGFORMER, clip_file, folder, text=text, task=task)


def zeroseg(clip_file, folder):
    task = {"options": {"views": {"grids": [1, 2], "size": 64}, "base_learning_rate": 0.01}}
    return configure("zeroseg", ZEROSEG, clip_file, folder, task=task)


@pytest.fixture(scope="module", params=[zegformer, zeroseg])
def run(request, clip_file, tmp_path_factory):
    """A finished run: what was configured, and what came out."""
    config = request.param(clip_file, tmp_path_factory.mktemp("runs") / "run")
    return config, train(config)


def test_run_trains_is_judged_and_loads(run):
    config, result = run
    assert result.finished
    assert {"pAcc", "mIoU(S)", "mIoU(U)", "hIoU"} <= result.metrics.keys()
    before = assemble(config).task.model.state_dict()
    after = read_checkpoint(result.last_checkpoint).model
    model = load_trained(result.last_checkpoint)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    clip = ("sem_seg_head.predictor.clip_model.", "text_encoder.")
    assert not {key for key in moved if key.startswith(clip)}
    encoder = ("backbone.stem.conv1.norm.", "encoder.patch_embed.")
    assert {key for key in moved if key.startswith(encoder)}


def test_run_exports_to_a_bundle_that_labels_alike(run, tmp_path):
    _, result = run
    classes, embeds = load_classes(result.run_folder)
    assert classes.names == tuple(CLASS_NAMES)
    settings = {"precisions": ("float32",), "text_encoder": None}
    bundle = export_trained(result.run_folder, tmp_path / "run.zsseg", **settings)
    segmenter = trained_segmenter(result.run_folder, classes.names, device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Engine(bundle) as engine:
        engine.set_classes(list(classes.phrases))
        np.testing.assert_allclose(engine.vocabulary.embeds, embeds, atol=1e-5)
        labels = engine.segment(picture).labels
    assert (labels == segmenter.segment(picture)).mean() > 0.99


def test_zegformer_is_what_was_configured(clip_file, tmp_path):
    parts = assemble(zegformer(clip_file, tmp_path))
    config = parts.task.model.config
    assert config.seen_classes == tuple(SEEN)
    assert (config.decoder.num_queries, config.decoder.hidden_dim) == (6, 32)
    assert parts.classes.region_templates == ("the {}", "one {}")
    assert parts.region_embeds.shape == parts.embeddings.phrase_embeds.shape
    assert not torch.allclose(parts.region_embeds, parts.embeddings.phrase_embeds, atol=1e-3)
    norms = {
        id(parameter)
        for module in parts.task.model.modules()
        if isinstance(module, LearnedBatchNorm)
        for parameter in module.parameters()
    }
    groups = parts.task.parameter_groups()
    found = {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0}
    assert norms
    assert norms <= found


@pytest.fixture
def official_zegformer(tmp_path):
    """An official checkpoint of training, which holds no CLIP, and CLIP's own file."""
    weights = tiny_zegformer.state_dict()
    bare = {k: v for k, v in weights.items() if not k.startswith(tiny_zegformer.CLIP)}
    torch.save({"model": bare, "iteration": 1}, tmp_path / "official.pth")
    prefix = tiny_zegformer.CLIP
    clip = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    save_file(clip, tmp_path / "clip.safetensors")

    def configured(**options):
        start = str(tmp_path / "official.pth")
        settings = {"num_heads": 4} | options
        return ModelConfig(architecture="zegformer", start_from=start, options=settings)

    return configured, {"pretrained": str(tmp_path / "clip.safetensors")}


def test_official_zegformer_starts_with_the_clip_that_is_named(official_zegformer):
    configured, clip = official_zegformer
    config = configured(**clip, activation="quick_gelu")
    model = build_model(config, seen=(0, 1), protocol="inductive")
    assert model.config.fusion == "seen_and_unseen"
    assert model.text_encoder is not None
    weights = tiny_zegformer.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_official_zegformer_without_clip_says_what_to_do(official_zegformer):
    configured, _ = official_zegformer
    message = "official.pth: .*CLIP's weights .*model.options.pretrained is CLIP's file.*fusion"
    with pytest.raises(CheckpointError, match=message):
        build_model(configured(), seen=(), protocol="inductive")
    with refused(ArgumentError, "model.options.pretrained"):
        build_model(configured(activation="gelu"), seen=(), protocol="inductive")
    with refused(ArgumentError, "model.options", "'pretraned'"):
        build_model(configured(pretraned="openai"), seen=(), protocol="inductive")
    for options in ({"ensemble": False}, {"fusion": "segments"}):  # the official flag, our word
        alone = build_model(configured(**options), seen=(), protocol="inductive")
        assert alone.config.fusion == "segments"


def test_zeroseg_learns_from_the_clip_that_names_classes(clip_file, tmp_path):
    parts = assemble(zeroseg(clip_file, tmp_path))
    teacher = parts.task.features.teacher.encoder.state_dict()
    weights = load_file(clip_file)
    assert torch.equal(teacher["proj"], weights["visual.proj"])
    assert parts.task.model.config.embed_dim == weights["visual.proj"].shape[1]
    assert parts.task.learning_rate == pytest.approx(0.01 * 2 / 256)


def test_zeroseg_ignores_labels(clip_file, tmp_path):
    task = assemble(zeroseg(clip_file, tmp_path)).task
    batch = next(
        assemble(zeroseg(clip_file, tmp_path)).batches(
            start_position=0, process_index=0, num_processes=1, batch_size=2
        )
    )
    torch.manual_seed(0)
    first = task.eval()(batch)
    batch.labels.fill_(3)
    torch.manual_seed(0)
    second = task(batch)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture
def halfway(clip_file, tmp_path):
    """A run of four steps with a CLIP of its own, as if it had been killed after two of them."""
    config = zeroseg(shutil.copy(clip_file, tmp_path / "teacher.safetensors"), tmp_path / "run")
    config = replace(config, loop=replace(config.loop, iterations=4, checkpoint_interval=2))
    last = train(config).last_checkpoint
    last.rename(tmp_path / "uninterrupted")
    return config, last.with_name("step-00000002.pt")


def test_resuming_without_the_teachers_weights_changes_no_bit(halfway, tmp_path):
    config, checkpoint = halfway
    assert not [name for name in read_checkpoint(checkpoint).task if "teacher" in name]
    resumed = train(config, resume=True).last_checkpoint
    first, second = (
        replace(read_checkpoint(path), losses={})  # means since the run began, or went on
        for path in (tmp_path / "uninterrupted", resumed)
    )
    assert alike(first, second)


def test_another_teacher_is_not_resumed_with(halfway, tmp_path):
    config, checkpoint = halfway
    path = tmp_path / "teacher.safetensors"
    weights = load_file(path)
    save_file(weights | {"visual.proj": weights["visual.proj"] + 1}, path)
    with refused(CheckpointError, None, "features.teacher"):
        train(config, resume=True)
    path.unlink()
    with refused(CheckpointError, "model.options.pretrained", "teacher.safetensors"):
        train(config, resume=True)
    assert load_trained(checkpoint).config.embed_dim == weights["visual.proj"].shape[1]


@pytest.mark.parametrize("protocol", ["transductive", "supervised"])
def test_zeroseg_has_one_protocol(protocol, clip_file, tmp_path):
    config = zeroseg(clip_file, tmp_path)
    raw = TrainConfig.from_dict(COMMON | {"task": {"protocol": protocol}})
    with refused(ArgumentError, "task.protocol", "'inductive'"):
        assemble(replace(config, task=raw.task))


def test_flags_of_earlier_configurations_are_understood(clip_file, tmp_path):
    options = ZEGFORMER | {"clip_classification": True, "ensemble": False}
    parts = assemble(configure("zegformer", options, clip_file, tmp_path))
    assert parts.task.model.config.fusion == "regions"


def test_wrong_backbone_is_named(clip_file, tmp_path):
    options = ZEGFORMER | {"backbone": {"stem_with": 8}}
    config = configure("zegformer", options, clip_file, tmp_path)
    with refused(ArgumentError, "model.options.backbone", "'stem_with'"):
        assemble(config)


@pytest.mark.parametrize("name", ["zegformer", "zeroseg"])
def test_comparison_knows_the_systems(name, clip_file, tmp_path):
    compared = Comparison.load("scenes")
    variant = next(variant for variant in compared.variants if variant.name == name)
    changes = {"model": {"options": {"pretrained": str(clip_file)}}}
    changes |= {use: {"options": {"length": 8}} for use in ("data", "evaluation")}
    tables = merge(variant.over(compared.shared), changes)
    parts = assemble(TrainConfig.from_dict(as_folder(tables, tmp_path)))
    assert parts.evaluation_dataset is not None
    assert len(parts.embeddings.phrase_embeds) == len(CLASS_NAMES)
    assert sum(p.numel() for p in parts.task.parameters() if p.requires_grad) < 3e6
