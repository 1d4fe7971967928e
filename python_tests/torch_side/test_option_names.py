"""Errors begin with the option that a person gave, and say commands that work in a checkout."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import zsseg_rt  # noqa: E402
from support.command_line import run  # noqa: E402
from support.errors import refused  # noqa: E402
from support.small_runs import SCENES, STUDENT, TABLES  # noqa: E402
from zsseg_rt.common.checks import arguments_called  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError  # noqa: E402
from zsseg_rt.training.assembly import assemble  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402

PACKAGE = Path(zsseg_rt.__file__).parent
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


def test_a_failed_download_names_the_option(monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with refused(CheckpointError, "model.options.pretrained"):
        build(model=clip_options("openai"))


def test_a_teacher_is_called_what_it_was_given_as(clip_file):
    with refused(CheckpointError, "task.options.teacher"):
        build(model=zeroseg(), task={"options": {"teacher": "absent.pt"}})
    with refused(CheckpointError, "task.options.teacher_activation"):
        build(model=zeroseg(), task={"options": {"teacher": clip_file}})


def test_commands_name_their_options(tmp_path, capsys):
    def error_of(*arguments):
        assert run(*arguments) == 1
        return capsys.readouterr().err

    data = ("evaluate", tmp_path, "--dataset", "folder", "--root", SCENES)
    assert error_of(*data, "--rename", "oak=elm").startswith("zsseg-rt: --rename: expected old")
    out = ("--out", tmp_path / "x.zsseg")
    found = error_of("export", "dense-clip", "--pretrained", "absent.pt", *out)
    assert found.startswith("zsseg-rt: --pretrained: expected a CLIP file")
    found = error_of("export", "zeroseg", "absent.safetensors", "--text", "absent.pt", *out)
    assert found.startswith("zsseg-rt: --text: expected a CLIP file")


def test_other_messages_stay_as_they_are():
    for message in ("weights.pt: expected a file", "no argument at all"):
        with (
            pytest.raises(CheckpointError, match=f"^{message}$"),
            arguments_called({"source": "--clip"}, "model.options", ["activation"]),
        ):
            raise CheckpointError(message)


def test_every_hint_is_for_an_extra_that_there_is():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    named = set()
    for path in PACKAGE.rglob("*.py"):
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
