"""Who may import whom: the runtime never needs torch, onnx or TensorRT, and starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
HEAVY = {"torch", "torchvision", "open_clip", "onnx", "onnxscript", "onnxruntime"}
TORCH_SIDE = ("models", "training", "export")
TORCH_FILES = {"backends/_torch.py"}


def _find_runtime_files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).as_posix()
        torch_side = relative.startswith(tuple(f"{name}/" for name in TORCH_SIDE))
        if not torch_side and not relative.startswith("backends/_"):
            yield relative


def imported_modules(source, *, top_level_only):
    tree = ast.parse(source)
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("relative", list(_find_runtime_files()))
def test_runtime_imports_nothing_heavy(relative):
    source = (PACKAGE / relative).read_text()
    found = {name.split(".")[0] for name in imported_modules(source, top_level_only=False)}
    assert not found & HEAVY
    at_start = relative.startswith("cli/")  # commands load the torch side when they are called
    names = set(imported_modules(source, top_level_only=at_start))
    assert not {n for n in names if n.startswith(tuple(f"zsseg_rt.{t}" for t in TORCH_SIDE))}


def test_models_never_import_the_runtime():
    forbidden = {"engine", "pipelines", "backends", "bundle", "stream", "export", "training"}
    for path in sorted((PACKAGE / "models").rglob("*.py")):
        for name in imported_modules(path.read_text(), top_level_only=False):
            parts = name.split(".")
            assert parts[0] != "zsseg_rt" or len(parts) < 2 or parts[1] not in forbidden, path.name


def test_export_never_imports_training():
    for path in sorted((PACKAGE / "export").rglob("*.py")):
        for name in imported_modules(path.read_text(), top_level_only=False):
            assert not name.startswith("zsseg_rt.training"), path.name


def test_bundles_are_judged_without_torch():
    code = """
import sys
from zsseg_rt.training import datasets, evaluation, metrics, segment_bundle
from zsseg_rt.training.datasets import scenes
print(sorted({name.split('.')[0] for name in sys.modules}))
"""
    assert not set(ast.literal_eval(run_python(code))) & HEAVY


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_import_stays_light():
    code = """
import sys
import zsseg_rt
print(sorted({name.split('.')[0] for name in sys.modules}))
"""
    loaded = set(ast.literal_eval(run_python(code)))
    assert not loaded & (HEAVY | {"numpy", "openvino", "cv2", "tensorrt", "tensorrt_rtx"})


def test_public_names_resolve():
    for name in zsseg_rt.__all__:
        assert getattr(zsseg_rt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        zsseg_rt.Engin  # noqa: B018
