"""A setting stands in one place: its option and its docstring are made from the field."""

from dataclasses import fields

import pytest
import typer

from support.command_line import run
from zsseg_rt import cli
from zsseg_rt.common.settings import changed
from zsseg_rt.config import EngineConfig
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.server.settings import ServerSettings

CLASSES = (EngineConfig, ServerSettings, ExportOptions)
OF_ENGINES = [
    f.metadata["option"].name(f.name) for f in fields(EngineConfig) if f.metadata["option"]
]
# What each option is refused with; those that take any text of the right type are left out.
REFUSED = {
    "--device": "gpu", "--backend": "onnx", "--precision": "fp64", "--unknown-below": "2",
    "--min-region-score": "-1", "--head-classes": "few", "--max-candidates": "0",
    "--windows": "wide", "--max-windows": "0", "--resize": "crop", "--threads": "-1",
}  # fmt: skip


def options_of(*words):
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {option for param in command.params for option in param.opts}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_field_s_meaning_is_in_the_docstring(cls):
    listed = cls.__doc__.partition("Attributes:")[2].partition("Raises:")[0]
    assert all(f"\n        {field.name}: " in listed for field in fields(cls))


@pytest.mark.parametrize(
    ("command", "lacks"),
    [("segment", ()), ("stream", ()), ("serve", ()), ("evaluate", ("--unknown-below",)),
     ("profile", OF_ENGINES[3:-1])],
)  # fmt: skip
def test_commands_take_the_options_of_an_engine(command, lacks):
    assert set(OF_ENGINES) - options_of(command) == set(lacks)


def test_the_server_s_and_an_export_s_options_are_their_fields():
    for cls, command in ((ServerSettings, ("serve",)), (ExportOptions, ("export", "dense"))):
        own = [field for field in fields(cls) if field.metadata["option"]]
        names = {field.metadata["option"].name(field.name) for field in own}
        assert names - options_of(*command) <= {"--precision", "--window-batch"}


@pytest.mark.parametrize("option", OF_ENGINES)
def test_a_bad_value_is_misuse_and_named_by_its_option(option, capsys):
    assert run("segment", "--demo", option, REFUSED[option]) == 2
    assert capsys.readouterr().err.startswith(f"zsseg-rt: {option}: expected")


def test_what_differs_from_the_defaults_is_told():
    config = EngineConfig(device="cpu", num_threads=2)
    assert changed(config) == {"device": "cpu", "num_threads": 2}
    assert changed(config, ("num_threads",)) == {"num_threads": 2}
