"""What TOML can say and no setting is, is refused by name, in files and in --set."""

import pytest

from support.command_line import run

pytest.importorskip("torch")

from support.errors import refused
from tools.studies.comparison import Comparison
from zsseg_rt.errors import ArgumentError
from zsseg_rt.training.config import TrainConfig

DATA = '[data]\nname = "folder"\n'
DEEP = "at most 20 lists and tables inside each other"
DOTS = ".".join("a" for _ in range(5000))
STRANGE = {
    "lists": ("[" * 5000 + "]" * 5000, DEEP),
    "a few lists": ("[" * 150 + "]" * 150, DEEP),
    "tables": ("{a = " * 400 + "1" + "}" * 400, DEEP),
    "dots": (f"{{ {DOTS} = 1 }}", DEEP),
    "day": ("2024-02-03", "got the date 2024-02-03. Put it in quotes"),
    "moment": ("2024-02-03T04:05:06Z", "got the datetime 2024-02-03"),
    "hour": ("[[04:05:06]]", "got the time 04:05:06"),
    "digits": ("9" * 5000, "64-bit integers, got a larger one"),
    "bits": (str(2**63), "64-bit integers, got a larger one"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_values_are_refused(tmp_path, name):
    value, message = STRANGE[name]
    (tmp_path / "a.toml").write_text(f"{DATA}[model.options]\npretrained = {value}\n")
    for kind in (TrainConfig, Comparison):
        with pytest.raises(ArgumentError, match=rf"a\.toml: expected .*{message}"):
            kind.load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text(DATA)
    with pytest.raises(ArgumentError, match=rf"--set.*: expected .*{message}") as caught:
        TrainConfig.load(tmp_path / "a.toml", [f"model.options.pretrained={value}"])
    assert len(str(caught.value)) < 300


def test_the_command_says_so_too(tmp_path, capsys):
    (tmp_path / "a.toml").write_text(DATA)
    for change in ("data.root=2024-02-03", f"{DOTS}=1", "a" * 5000, f"data.root={'[' * 5000}"):
        assert run("train", "-c", tmp_path / "a.toml", "--dry-run", "--set", change) == 1
        assert capsys.readouterr().err.startswith("zsseg-rt: --set")


@pytest.mark.parametrize("source", ["a" * 5000, "a" * 5000 + ".toml", "a\0b", "/"])
def test_names_that_no_file_has_are_refused(source):
    with pytest.raises(ArgumentError, match=r"cannot be read|expected a TOML file or one of"):
        TrainConfig.load(source)


def test_text_that_cannot_be_written_again_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text(DATA)
    with refused(ArgumentError, "--set"):
        TrainConfig.load(tmp_path / "a.toml", ["data.root=photos\udcff"])


@pytest.mark.parametrize("text", ["a\\u007fb", "\\r\\n", "\\u0085", '\\"', "\\u0000", "😀"])
def test_settings_survive_being_written(tmp_path, text):
    (tmp_path / "a.toml").write_text(DATA)
    config = TrainConfig.load(tmp_path / "a.toml", [f'model.options={{ "{text}" = ["{text}"] }}'])
    (tmp_path / "b.toml").write_text(config.to_toml(), encoding="utf-8")
    again = TrainConfig.load(tmp_path / "b.toml")
    assert again == config
    assert not config.differences(again)


def test_no_setting_is_nan(tmp_path):
    (tmp_path / "a.toml").write_text(DATA)
    with refused(ArgumentError, "--set"):
        TrainConfig.load(tmp_path / "a.toml", ["model.options.pull=nan"])


def test_what_is_not_toml_is_a_word(tmp_path):
    (tmp_path / "a.toml").write_text(DATA)
    config = TrainConfig.load(tmp_path / "a.toml", ["data.root=2024-02-30"])  # no such day
    assert config.data.root == "2024-02-30"


def test_settings_that_nest_within_reason_are_taken(tmp_path):
    (tmp_path / "a.toml").write_text(f"{DATA}[model.options]\ndeep = [[[[1, 2.5], [true]], 'a']]\n")
    config = TrainConfig.load(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text(config.to_toml())
    assert TrainConfig.load(tmp_path / "b.toml") == config
