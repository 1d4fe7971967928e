"""Exported graphs are kept between runs, so that equal modules are traced once.

A graph is found again if the sources that make it, the exporter's packages, the module's weights
and settings and the example inputs are all the same. The folder may be deleted at any time.
What is traced all the same shares torch's list of operators, whose sources it parses every time.

``ZSSEG_TEST_CACHE=DIR`` names another folder; empty means that nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "zsseg_rt"
# What is run while a module is traced and its graph is tidied up.
MADE_BY = ("models", "torch_files", "export")
PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
_GENERATIONS = 3
_OWN = re.compile(r"(zsseg_rt|torch)\.")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def folder() -> Path | None:
    """Where graphs are kept, below the user's cache folder; None if nothing is to be kept."""
    named = os.environ.get("ZSSEG_TEST_CACHE")
    if named is not None:
        return Path(named) if named else None
    beside = os.environ.get("XDG_CACHE_HOME")
    return (Path(beside) if beside else Path.home() / ".cache") / "zsseg_rt_tests"


def install(root: Path) -> None:
    """Let ``GraphExport.to_onnx`` look into the folder first, in this process."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from zsseg_rt.export.onnx import GraphExport

    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))
    GraphExport.to_onnx = kept_in(root, GraphExport.to_onnx)


def kept_in(root: Path, make: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """``make(graph, name)``, but read from ``root`` if an equal one was made before."""
    import onnx
    import torch

    exporter = torch.onnx.export

    def to_onnx(graph: Any, name: str) -> Any:
        key = None if torch.onnx.export is not exporter else key_of(graph, name)
        if key is None:
            return make(graph, name)
        path = _generation(root) / f"{key}.onnx"
        if path.is_file():
            return onnx.load(path)
        made = make(graph, name)
        _write(path, made.SerializeToString())
        return made

    return to_onnx


def key_of(graph: Any, name: str) -> str | None:
    """A hash of what is traced; None for modules of others and for what has no lasting words."""
    digest = hashlib.sha256()
    for part in _parts(graph, name):
        if isinstance(part, str) and _ADDRESS.search(part):
            return None
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    modules = (type(module) for module in graph.module.modules())
    return digest.hexdigest() if all(_OWN.match(kind.__module__) for kind in modules) else None


def _parts(graph: Any, name: str) -> Iterator[str | bytes]:
    yield from (name, repr(graph.outputs), repr(sorted(_open_axes(graph))))
    for label, tensor in graph.inputs.items():
        yield label
        yield from _of_tensor(tensor)
    for path, module in graph.module.named_modules(remove_duplicate=False):
        yield f"{path} {type(module).__module__}.{type(module).__qualname__}"
        tensors = {**module._parameters, **module._buffers}
        settings = {**vars(module)}
        for own in ("_parameters", "_buffers", "_modules"):
            del settings[own]
        for label, value in (*sorted(tensors.items()), *sorted(settings.items())):
            yield label
            yield from _of_tensor(value) if hasattr(value, "untyped_storage") else (repr(value),)


def _open_axes(graph: Any) -> Iterator[tuple[str, int, str, bool]]:
    """Of their largest sizes, which only limit what may be given, just whether they are open."""
    for tensor, axes in graph.dynamic.items():
        for axis, (label, most) in axes.items():
            yield tensor, axis, label, most > 1


def _of_tensor(tensor: Any) -> Iterator[str | bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    yield tensor.detach().contiguous().flatten().view(-1).numpy().tobytes()


@cache
def _generation(root: Path) -> Path:
    """The folder of these sources and packages; those of the oldest ones are removed."""
    digest = hashlib.sha256(sys.version.encode())
    for package in PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    for part in MADE_BY:
        for path in sorted((PACKAGE / part).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    chosen = root / "graphs" / digest.hexdigest()[:32]
    chosen.mkdir(parents=True, exist_ok=True)
    chosen.touch()
    by_age = sorted(chosen.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in by_age[_GENERATIONS:]:
        shutil.rmtree(old, ignore_errors=True)
    return chosen


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; another process may write the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
