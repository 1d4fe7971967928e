"""Rules that import-linter's contracts (pyproject.toml) cannot see: modules loaded, lengths.

Who may import whom is checked by ``lint-imports``, which tools/test.sh runs.
"""

import ast
import re
from pathlib import Path

import pytest

import zsseg_rt
from support.command_line import python
from zsseg_rt import errors

PACKAGE = Path(zsseg_rt.__file__).parent
HEAVY = {"torch", "torchvision", "open_clip", "onnx", "onnxruntime"}
TORCH_SIDE = ("models", "torch_files", "training", "export")
LONGEST_FUNCTION, LONGEST_FILE = 50, 800  # lines; a docstring is no part of a function's

LOADED = """
import sys
for name in sys.argv[1:]:
    __import__(name)
print(sorted(sys.modules))
"""


def loaded_by(*names):
    return ast.literal_eval(python("-c", LOADED, *names).stdout)


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


def test_every_error_is_public():
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
