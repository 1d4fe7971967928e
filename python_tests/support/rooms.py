"""Which room a file of tests belongs into, by what it imports and starts.

``python python_tests/support/rooms.py ROOM`` prints the files of one room:

- ``unit``: no torch, no other process, no server, no camera: seconds.
- ``torch_side``: models, export, training, and whatever else imports torch or ONNX.
- ``system``: processes, servers, cameras, browsers, the documents that run.
- ``cuda``: what is about the emulated GPU or a real one. Operations' tests on CUDA stay beside
  those on a CPU.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# No room is named torch: its folder would pass for the package where that is not installed.
TESTS = Path(__file__).resolve().parents[1]
ROOMS = ("unit", "torch_side", "system", "cuda")
# What a file is about decides before what it imports.
_BY_NAME = (
    (re.compile(r"test_(cuda|gpu)_"), "cuda"),
    (re.compile(r"test_(models|export|training)_"), "torch_side"),
)
_TORCH = {"torch", "torchvision", "onnx", "open_clip", "accelerate"}
_TORCH_SIDE = ("export", "models", "torch_files", "training")
_TORCH_FIXTURES = {"colour_bundle", "zegclip_model", "zegclip_bundle", "without_gradients"}
_PROCESSES = {"subprocess", "multiprocessing", "playwright", "gi", "socket"}
_SERVERS = {"fastapi", "httpx", "uvicorn", "websockets", "ray"}
_SYSTEM_FIXTURES = {"rtsp_cameras", "v4l2_driver"}


def room_of(path: Path) -> str:
    """The room of one ``test_*.py``."""
    for name, room in _BY_NAME:
        if name.match(path.name):
            return room
    imported, fixtures = set(_all_imports(path)), _arguments(path)
    if imported & (_PROCESSES | _SERVERS) or fixtures & _SYSTEM_FIXTURES:
        return "system"
    if imported & _TORCH or fixtures & _TORCH_FIXTURES:
        return "torch_side"
    return "unit"


def files_of(room: str) -> list[Path]:
    """The files of a room, whatever folder they are in."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if room_of(path) == room]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _all_imports(path: Path, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Names of packages that a file imports, by helpers in ``support`` too."""
    for name in _imports(path):
        first, *rest = name.split(".")
        helper = TESTS.joinpath(*name.split(".")).with_suffix(".py")
        if first == "support" and helper.is_file() and helper not in seen:
            yield from _all_imports(helper, seen | {helper})
        elif name.startswith("tools.studies") or (
            first == "zsseg_rt" and rest and rest[0] in _TORCH_SIDE
        ):
            yield "torch"
        elif first == "zsseg_rt" and rest and rest[0] == "server":
            yield "fastapi"
        else:
            yield first


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _arguments(path: Path) -> set[str]:
    """Names of all functions' arguments, and those that ``usefixtures`` names."""
    names = {node.arg for node in ast.walk(_tree(path)) if isinstance(node, ast.arg)}
    calls = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call))
    marks = (call for call in calls if getattr(call.func, "attr", "") == "usefixtures")
    return names | {str(arg.value) for mark in marks for arg in mark.args if hasattr(arg, "value")}


if __name__ == "__main__":
    print(*files_of(sys.argv[1]), sep="\n")
