"""Options and configurations as a person writes them, and errors that name them."""

import hashlib
import inspect
import json
import math
import re
from pathlib import Path

import pytest

from support.command_line import run
from support.errors import refused
from support.small_runs import STUDENT, TABLES
from tools.studies.compare_systems import Comparison
from zsseg_rt.common.schema import encode, setting_names
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.models.registry import find_builder
from zsseg_rt.training.assembly import assemble, build_augmentation, build_model
from zsseg_rt.training.config import (
    DataConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    list_recipes,
)
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.tasks.zegformer import SegmentWeights
from zsseg_rt.training.tasks.zeroseg import TeacherFeatures, TeacherViews, ZeroSegTask

ROOT = Path(__file__).parents[2]


def build(**tables):
    return assemble(TrainConfig.from_dict(TABLES | {"evaluation": {"split": ""}} | tables))


def clip_options(source, **others):
    return {"options": {"pretrained": source, "image_size": 64} | others}


def zeroseg(**options):
    return {"architecture": "zeroseg", "options": STUDENT | {"embed_dim": 32} | options}


SOUND = {"activation": "quick_gelu"}
REFUSED = [  # the model's source and options, other tables, and the argument that is named
    (("absent.pt", {}), {}, "model.options.pretrained"),
    (("opnai", {}), {}, "model.options.pretrained"),
    ((None, {}), {}, "model.options.activation"),
    ((None, SOUND), {"text": {"clip": "absent.pt"}}, "text.clip"),
    ((None, SOUND), {"text": {"clip": None}}, "text.clip_activation"),
    ((None, SOUND | {"start": "picture"}), {}, "model.options.start"),
    (
        (None, SOUND | {"num_prompts": 2}),
        {"task": {"options": {"focal_weight": -1.0}}},
        "task.options.focal_weight",
    ),
]


@pytest.mark.parametrize(("model", "tables", "argument"), REFUSED)
def test_errors_of_training_name_the_setting(clip_file, model, tables, argument):
    source, options = model
    if tables.get("text", {"clip": ""})["clip"] is None:
        tables = {"text": {"clip": clip_file}}
    with refused((ArgumentError, CheckpointError), argument):
        build(model=clip_options(source or clip_file, **options), **tables)


def test_a_failed_download_and_a_teacher_name_the_setting(clip_file, monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with refused(CheckpointError, "model.options.pretrained"):
        build(model=clip_options("openai"))
    with refused(CheckpointError, "task.options.teacher"):
        build(model=zeroseg(), task={"options": {"teacher": "absent.pt"}})
    with refused(CheckpointError, "task.options.teacher_activation"):
        build(model=zeroseg(), task={"options": {"teacher": clip_file}})


def test_a_command_names_its_option(tmp_path, capsys):
    call = ("export", "zeroseg", "absent.safetensors", "--text", "absent.pt")
    assert run(*call, "--out", tmp_path / "x.zsseg") == 1
    assert capsys.readouterr().err.startswith("zsseg-rt: --text: expected a CLIP file")


def test_every_hint_is_for_an_extra_that_there_is():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    named = set()
    for path in (ROOT / "zsseg_rt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "zsseg_rt[" not in text, path
        for call in re.findall(r"install_command\(([^)]*)\)", text):
            named |= set(re.findall(r"[\"'](\w+)[\"']", call))
        named |= set(re.findall(r"needs_extra\(\"(\w+)\"", text))
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert "zsseg_rt[" not in text, path
        named |= set(re.findall(r"pip install '\.\[(\w+)\]'", text))
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


def test_names_that_no_file_has_are_refused():
    for source in ("a" * 5000, "a" * 5000 + ".toml", "a\0b", "/", "zegclip_vok", "missing.toml"):
        with pytest.raises(ArgumentError, match=r"cannot be read|expected a TOML file or one of"):
            TrainConfig.load(source)


@pytest.mark.parametrize(
    "change",
    [
        *(
            f'model.options={{ "{text}" = ["{text}"] }}'
            for text in ("a\\u007fb", "\\r\\n", "\\u0085", '\\"', "\\u0000", "😀")
        ),
        "model.options.deep=[[[[1, 2.5], [true]], 'a']]",
        'text.templates=["a \\"{}\\"", "{} é"]',
    ],
)
def test_settings_survive_being_written(config_path, tmp_path, change):
    config = TrainConfig.load(config_path, [change])
    (tmp_path / "b.toml").write_text(config.to_toml(), encoding="utf-8")
    again = TrainConfig.load(tmp_path / "b.toml")
    assert again == config != TrainConfig.load(config_path)
    assert not config.differences(again)


def test_options_are_refused_before_anything_is_read(tmp_path):
    nothing = type("Nothing", (list,), {"name": "nothing"})()
    with refused(DatasetError, "data", "nothing"):
        assemble(TrainConfig.from_dict(TABLES), dataset=nothing)
    for options, argument in (
        ({}, "model.options.pretrained"),
        ({"pretrained": 3}, "model.options.pretrained"),
        ({"image_size": "512"}, "model.options.image_size"),
        ({"activation": "relu"}, "model.options.activation"),
        ({"image_sise": 1}, "model.options"),
    ):
        options = {"pretrained": "nowhere.pt"} | options if options else {}
        config = ModelConfig(architecture="zegclip", options=options)
        with refused(ArgumentError, argument):
            build_model(config, seen=(0,), protocol="inductive")
    for name, value in (("unseen", "car"), ("zero_is_unlabelled", "no")):
        with refused(ArgumentError, None, name, f"'{value}'"):
            create_dataset("folder", tmp_path, **{name: value})


def rows_of_the_page():
    page = ROOT / "docs" / "settings.md"
    items = r"^- \*\*(.*?)\*\*: (.*(?:\n  .*)*)$"
    return re.findall(items, page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("architecture", [name for name in TASKS if name != "zeroseg"])
def test_every_model_option_is_on_the_page(architecture):
    own = ("all that start", "`zegclip`", f"`{architecture}`")
    texts = [text for name, text in rows_of_the_page() if name.startswith(own)]
    named = set(re.findall(r"`(\w+)`", " ".join(texts)))
    options = set(setting_names(find_builder(architecture, official=False)))
    assert options - named == {"seen_classes", "self_trained"} & options


OF_TEACHERS = {"teacher", "teacher_architecture", "teacher_activation", "views"}


@pytest.mark.parametrize(
    ("row", "architecture", "more", "others"),
    [
        ("ZegCLIP, CLIP-RC", "zegclip", [], set()),
        ("cosine head", "cosine_head", [], set()),
        ("CAT-Seg", "cat_seg", [], set()),
        ("ZegFormer", "zegformer", [SegmentWeights], set()),
        ("ZeroSeg", "zeroseg", [TeacherFeatures, TeacherViews], OF_TEACHERS),
    ],
)
def test_every_task_option_is_on_the_page_and_there(row, architecture, more, others):
    (text,) = (text for name, text in rows_of_the_page() if name == row)
    named = set(re.findall(r"`(\w+)`", text))
    taken = {name for taker in (TASKS[architecture], *more) for name in setting_names(taker)}
    inner = {"seen", "ignore_label", "protocol", "batch_size", "num_images", "prompts"}
    assert named == (taken | others) - inner


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
