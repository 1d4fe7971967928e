"""A path that is longer than the system allows is refused like any other that is not there."""

from pathlib import Path

import pytest

from support.command_line import run
from support.errors import refused
from zsseg_rt import ArgumentError
from zsseg_rt.common.files import is_file, is_folder
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.stream.sinks import open_writers
from zsseg_rt.stream.uris import open_sources

LONG = "x" * 300  # file systems take 255 bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", LONG], "expected a bundle folder"),
        (
            ["segment", "a.png", "--demo", "scenes", "--out", "out", "--json", LONG],
            "File name too long",
        ),
        (["profile", LONG], "expected a bundle folder"),
    ],
)
def test_commands_refuse_it(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"not looked at before")
    code = run(*words)
    assert code in (1, 2)
    complaint = capsys.readouterr().err
    assert message in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_readers_and_writers_refuse_it():
    with refused(ArgumentError, "sink"):
        open_writers([LONG], channel_order="rgb", alpha=0.5)
    with refused(DatasetError, "root"):
        create_dataset("folder", LONG)
    (source,) = open_sources(f"{LONG}*")
    assert source.name == f"{LONG}*"


def test_nothing_can_be_there(tmp_path):
    assert not is_folder(Path(LONG))
    assert not is_file(Path(LONG))
    assert is_folder(tmp_path)
    assert not is_file(tmp_path)
