"""A camera of this machine without one: FFmpeg's V4L2 code on a driver that is a test's own.

``v4l2_driver.c`` says what the driver can be told. It works by LD_PRELOAD, so each test runs a
function of its file in a process of its own and looks at what it returns.
"""

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.command_line import python
from support.required import without_streams

SOURCE = Path(__file__).with_name("v4l2_driver.c")
ENDS_WITHIN = 100  # seconds, on a busy machine


def build_driver(folder: Path) -> Path:
    """Compile the driver; skip where that cannot be done."""
    compiler = shutil.which("cc")
    if compiler is None:
        without_streams("no C compiler found (cc): apt install gcc")
    library = folder / "v4l2_driver.so"
    call = [compiler, "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(call, check=True, timeout=ENDS_WITHIN)
    return library


def run_with_camera(library: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function of a test's file in a process that has the camera; return its result."""
    code = (
        "import importlib, json, sys\n"
        "module, function, arguments = json.loads(sys.argv[1])\n"
        "result = getattr(importlib.import_module(module), function)(*arguments)\n"
        "print(json.dumps(result))\n"
    )
    call = json.dumps([function.__module__, function.__name__, arguments])
    folders = (Path(function.__code__.co_filename).parent, Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
    variables = {"LD_PRELOAD": str(library), "PYTHONPATH": path}
    done = python("-c", code, call, timeout=ENDS_WITHIN, more_env=variables)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def steer(**settings: int) -> None:
    """Tell the driver of this process what to do, by the names of its variables."""
    for name, value in settings.items():
        ctypes.c_int.in_dll(ctypes.CDLL(None), f"driver_{name}").value = value


def lent() -> int:
    """Buffers that FFmpeg had not given back when it closed the device: their memory is gone."""
    return ctypes.c_int.in_dll(ctypes.CDLL(None), "driver_lent").value


def stamp(number: int) -> float:
    """When the driver took a picture, in seconds of its clock."""
    stamps = (ctypes.c_longlong * 4096).in_dll(ctypes.CDLL(None), "driver_stamps")
    return stamps[number] / 1e6
