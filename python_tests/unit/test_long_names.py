"""A path that is longer than the system allows is refused like any other that is not there."""

from pathlib import Path

import pytest

from support.command_line import run

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
