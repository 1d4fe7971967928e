"""Errors name the argument that was wrong, whoever raises them."""

import ast
from pathlib import Path

import pytest

import zsseg_rt
from zsseg_rt.errors import ArgumentError, ConfigError, ZssegError

PACKAGE = Path(zsseg_rt.__file__).parent
OF_ARGUMENTS = {"ArgumentError", "ConfigError", "ShapeError", "DTypeError", "VocabularyError"}


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        ("policy: expected latest or all, got 'none'", "policy"),
        ("class_names[3]: expected text, got 5", "class_names"),
        ("model.options.size: expected two numbers", "model.options.size"),
        ("--rename: expected old=new", "--rename"),
        ("the engine is closed", None),
        ("expected: something else", "expected"),
        ("", None),
    ],
)
def test_an_error_knows_its_argument(message, argument):
    assert ArgumentError(message).argument == argument
    assert str(ArgumentError(message)) == message


def test_a_renamed_error_keeps_its_class_its_index_and_its_reason():
    renamed = ConfigError("class_names[3]: expected text").renamed("--classes")
    assert type(renamed) is ConfigError
    assert (str(renamed), renamed.argument) == ("--classes[3]: expected text", "--classes")


def template(call):
    """A message with "name" in place of what is filled in; None where it is made elsewhere."""
    match call.args[0]:
        case ast.Constant(value=text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(
                part.value if isinstance(part, ast.Constant) else "name" for part in parts
            )
    return None


def test_every_argument_error_begins_with_a_name():
    messages = [
        (f"{path.name}:{node.lineno}", template(node))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in OF_ARGUMENTS
    ]
    assert len(messages) > 200
    assert [at for at, text in messages if text and ZssegError(text).argument is None] == []
