"""Rules of the code that ``lint-imports`` cannot see: modules loaded, lengths, what errors name."""

import ast
import re
from pathlib import Path

import pytest

import zsseg_rt
from support.command_line import python
from zsseg_rt import errors
from zsseg_rt.errors import ArgumentError, ConfigError, ZssegError

PACKAGE = Path(zsseg_rt.__file__).parent
HEAVY = {"torch", "torchvision", "open_clip", "onnx", "onnxruntime"}
TORCH_SIDE = ("models", "torch_files", "training", "export")
LONGEST_FUNCTION, LONGEST_FILE = 50, 800  # lines; a docstring is no part of a function's

OF_ARGUMENTS = {"ArgumentError", "ConfigError", "ShapeError", "DTypeError", "VocabularyError"}


def loaded_by(*names):
    code = "import sys; [*map(__import__, sys.argv[1:])]; print(sorted(sys.modules))"
    return ast.literal_eval(python("-c", code, *names).stdout)


def runtime_modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")
        torch_side = name.split("/")[0] in TORCH_SIDE or "_torch" in name
        if not torch_side and "__" not in name:
            yield f"zsseg_rt.{name.replace('/', '.')}"


def test_the_runtime_loads_nothing_of_the_torch_side():
    loaded = loaded_by(*runtime_modules())
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    inside = {name.split(".")[1] for name in loaded if name.startswith("zsseg_rt.")}
    assert {"cli", "engine", "evaluation"} <= inside
    assert not inside & {"models", "torch_files", "training"}  # cli reads export's options alone


def test_networks_are_written_without_torch_and_onnx():
    paths = [path for room in ("onnx", "networks") for path in (PACKAGE / room).glob("[a-z]*.py")]
    loaded = loaded_by(*(f"zsseg_rt.{path.parent.name}.{path.stem}" for path in paths))
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_import_stays_light():
    loaded = {name.split(".")[0] for name in loaded_by("zsseg_rt")}
    assert not loaded & (HEAVY | {"numpy", "openvino", "cv2", "tensorrt", "tensorrt_rtx"})


def test_public_names_resolve():
    for name in zsseg_rt.__all__:
        assert getattr(zsseg_rt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        zsseg_rt.Engin  # noqa: B018
    assert set(errors.__all__) <= set(zsseg_rt.__all__)


def test_the_stub_types_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = {
        a.asname: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert imported.keys() | {"__version__"} == set(zsseg_rt.__all__)
    for name, module in imported.items():
        assert getattr(zsseg_rt, name).__module__ == module


def too_long():
    """Names of files, and of functions without their docstrings, beyond our limits."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > LONGEST_FILE:
            yield path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0] if ast.get_docstring(node) else None
                doc = first.end_lineno - first.lineno + 1 if first else 0
                if node.end_lineno - node.lineno + 1 - doc > LONGEST_FUNCTION:
                    yield node.name


def test_functions_and_files_stay_short():
    assert list(too_long()) == []


def test_only_operations_import_the_compiled_core():
    pattern = re.compile(r"import _C\b|zsseg_rt\._C import")
    paths = [path for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())]
    assert {path.parent.name for path in paths} == {"ops"}


def test_the_root_is_the_face():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"]) <= 22


def test_an_error_knows_its_argument():
    for message, argument in (
        ("policy: expected latest or all, got 'none'", "policy"),
        ("class_names[3]: expected text, got 5", "class_names"),
        ("model.options.size: expected two numbers", "model.options.size"),
        ("--rename: expected old=new", "--rename"),
        ("the engine is closed", None),
        ("expected: something else", "expected"),
        ("", None),
    ):
        assert (ArgumentError(message).argument, str(ArgumentError(message))) == (argument, message)
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
