"""The recipes that the package brings: complete, of known settings, and what the papers say."""

import hashlib
import inspect
import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support.dataset_trees import photo  # noqa: E402
from support.errors import refused  # noqa: E402
from support.small_runs import save_clip  # noqa: E402
from zsseg_rt.common.schema import encode, setting_names  # noqa: E402
from zsseg_rt.errors import ArgumentError, DatasetError  # noqa: E402
from zsseg_rt.evaluation.datasets.published import class_table  # noqa: E402
from zsseg_rt.models.registry import find_builder  # noqa: E402
from zsseg_rt.training.assembly import assemble, train  # noqa: E402
from zsseg_rt.training.config import DataConfig, TrainConfig, list_recipes  # noqa: E402
from zsseg_rt.training.parts import build_augmentation  # noqa: E402
from zsseg_rt.training.tasks import TASKS  # noqa: E402
from zsseg_rt.training.tasks.zeroseg import ZeroSegTask, scaled_learning_rate  # noqa: E402
from zsseg_rt.training.trained.card import load_trained  # noqa: E402

SMALL_STUDENT = """{ image_size = 64, width = 32, num_layers = 1, num_heads = 2, grid_side = 4,
 decoder_width = 16, decoder_layers = 1, decoder_heads = 2, head_width = 32, head_heads = 2,
 group_tokens = [4, 2], embed_dim = 32, projection_width = 32 }""".replace("\n", "")


# Of each recipe's settings other than the defaults, as they were when every recipe was one file.
DIGESTS = {
    "catseg_coco_supervised": "d3619e3f2997",
    "cliprc_coco_inductive": "337b51943e4a",
    "cliprc_coco_supervised": "5e9502fc4821",
    "cliprc_coco_transductive": "8621624042fd",
    "cliprc_voc_inductive": "48deaaf7cc84",
    "cliprc_voc_supervised": "16147ad38702",
    "cliprc_voc_transductive": "1a4800edfee6",
    "zegclip_coco_inductive": "ae4cc2897c03",
    "zegclip_coco_supervised": "c41014770914",
    "zegclip_coco_transductive": "ecb24d6a0077",
    "zegclip_voc_inductive": "4dac46ff3988",
    "zegclip_voc_supervised": "ee1bb324b46a",
    "zegclip_voc_transductive": "a6dadcc1d272",
    "zegformer_ade20kfull_inductive": "5c75332b2683",
    "zegformer_coco_inductive": "bd56a8aa82d7",
    "zegformer_voc_inductive": "82b764c37d8c",
    "zeroseg_imagenet_inductive": "7ab1b6f07e09",
}


@pytest.mark.parametrize("recipe", DIGESTS)
def test_a_recipe_over_its_base_is_the_whole_recipe(recipe):
    plain = encode(TrainConfig(data=DataConfig(name="")))
    found = {
        f"{table}.{key}": value
        for table, fields in encode(TrainConfig.load(recipe)).items()
        for key, value in fields.items()
        if value != plain[table][key]
    }
    text = json.dumps(found, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == DIGESTS[recipe]


def test_a_file_of_ones_own_is_laid_over_a_recipe(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('base = "zegclip_voc_inductive"\n[data]\nname = "folder"\n[loop]\nseed = 3\n')
    found, base = TrainConfig.load(path), TrainConfig.load("zegclip_voc_inductive")
    assert found.differences(base) == ["data.name", "loop.seed"]
    assert found == TrainConfig.load(path.rename(tmp_path / "zegclip_voc_inductive"))
    for wrong in ('"zegclip"', '"own.toml"', "3", "[]"):
        path.write_text(f"base = {wrong}\n[data]\nname = 'folder'\n")
        with pytest.raises(ArgumentError, match="base: expected one of the recipes"):
            TrainConfig.load(path)


@pytest.mark.parametrize("recipe", list_recipes())
def test_recipes_are_complete(recipe):
    config = TrainConfig.load(recipe)
    assert config.output.folder == f"runs/{recipe}"
    assert config.schedule.factor(config.loop.iterations // 2, config.loop.iterations) > 0


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if name != "demo"])
def test_recipes_name_what_exists(recipe):
    config = TrainConfig.load(recipe, ["data.root=nowhere"])
    build_augmentation(config.data.augmentation)
    with pytest.raises(DatasetError, match="nowhere"):
        config.open_data("training")
    if not config.model.start_from:
        builder = inspect.signature(find_builder(config.model.architecture, official=False))
        builder.bind(**config.model.options)
    kind = TASKS[config.model.architecture]
    features = {"teacher", "teacher_architecture", "views"} if kind is ZeroSegTask else set()
    assert config.task.options.keys() <= {*setting_names(kind), *features}


@pytest.mark.parametrize(
    ("recipe", "classes", "settings"),
    [
        ("zegformer_voc_inductive", (20, 15), (10_000, 512, 0.1)),
        ("zegformer_coco_inductive", (171, 156), (60_000, 640, 0.1)),
        ("zegformer_ade20kfull_inductive", (847, 572), (60_000, 512, 0.0)),
    ],
)
def test_zegformer_recipes_are_the_official_settings(recipe, classes, settings):
    config = TrainConfig.load(recipe)
    table = class_table(config.data.name)
    assert (len(table.names), len(table.seen)) == classes
    options = config.model.options
    assert (config.loop.iterations, options["image_size"], options["calibration"]) == settings
    augmentation = build_augmentation(config.data.augmentation)
    assert augmentation.crop_hw == (settings[1], settings[1])
    steps = range(5, 16 if settings[1] == 640 else 21)
    assert augmentation.short_edges == tuple(int(0.1 * k * settings[1]) for k in steps)
    assert (config.optimizer.max_grad_norm, config.loop.batch_size) == (0.01, 32)
    assert config.schedule.factor(0, config.loop.iterations) == 1  # no warm-up


def test_zeroseg_recipe_is_the_papers_schedule():
    config = TrainConfig.load("zeroseg_imagenet_inductive")
    epoch = 1_281_167 // config.loop.batch_size
    assert config.loop.iterations == 80 * epoch
    assert config.schedule.warmup_steps == 20 * epoch
    peak = scaled_learning_rate(config.task.options["base_learning_rate"], config.loop.batch_size)
    assert peak == pytest.approx(2.4e-3)
    assert config.optimizer.betas == (0.9, 0.95)


def test_unknown_recipe_lists_the_known():
    with refused(ArgumentError, "config"):
        TrainConfig.load("zegclip_vok")
    with refused(ArgumentError, "config"):
        TrainConfig.load("missing.toml")


def test_zeroseg_recipe_trains_on_photos_without_masks(tmp_path):
    """The recipe's own settings with a small student, teacher and batch."""
    for name in ("train/n01/a.jpg", "train/n02/b.JPEG", "val/c.jpg"):
        photo(tmp_path / "imagenet" / name, (80, 100))
    save_clip(tmp_path / "clip.safetensors")
    changes = {
        "data.root": tmp_path / "imagenet",
        "data.augmentation": "{ kind = 'center_crop', crop_hw = [64, 64], short_edge = 64 }",
        "model.options": SMALL_STUDENT,
        "task.options.teacher": tmp_path / "clip.safetensors",
        "task.options.teacher_activation": "quick_gelu",
        "task.options.views": "{ grids = [1, 2], size = 64 }",
        "schedule.warmup_steps": 1,
        "loop.iterations": 2,
        "loop.batch_size": 2,
        "loop.device": "cpu",
        "loop.num_workers": 0,
        "output.folder": tmp_path / "run",
    }
    recipe = "zeroseg_imagenet_inductive"
    config = TrainConfig.load(recipe, [f"{key}={value}" for key, value in changes.items()])
    result = train(config)
    assert result.finished
    assert result.losses.keys() == {"reconstruction", "views", "segments"}
    assert load_trained(tmp_path / "run").config.grid_side == 4
    labelled = TrainConfig.load(recipe, [f"data.root={tmp_path}/imagenet", "model.options={}"])
    labelled = replace(labelled, model=replace(labelled.model, architecture="cosine_head"))
    options = {"pretrained": str(tmp_path / "clip.safetensors"), "activation": "quick_gelu"}
    labelled = replace(labelled, model=replace(labelled.model, options=options))
    with refused(ArgumentError, "data.name"):
        assemble(labelled)
