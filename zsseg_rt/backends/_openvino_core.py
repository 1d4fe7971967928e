"""The process's one OpenVINO core."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from zsseg_rt.backends.graph_check.graph import map_file, read_interface
from zsseg_rt.common.arrays import HALF_PRECISIONS
from zsseg_rt.errors import BackendUnavailableError

# What its binding turns C++ exceptions into. A message that quotes bytes of a damaged graph becomes
# UnicodeDecodeError, a ValueError.
RAISED = (RuntimeError, ValueError, IndexError, OverflowError, MemoryError)
# Lines of OpenVINO's messages that name its own source code, not the problem.
_BOILERPLATE = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't", "Summary:")

_lock = threading.Lock()
_core: Any = None


def process_core() -> Any:
    """The ``openvino.Core`` that every session shares; it lives as long as the process.

    The CPU plugin gives the thread that makes a core an alternate signal stack (``sigaltstack(2)``)
    and unmaps it together with the core.  Two cores that do not end in reverse order leave the
    thread with an unmapped one, and the next signal that has a handler, such as Python's for
    SIGCHLD or SIGINT, ends the process with SIGSEGV (seen with OpenVINO 2026.4).
    """
    global _core
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailableError(
            "backend: expected the package openvino, got nothing. Run: pip install openvino"
        ) from exc
    with _lock:
        if _core is None:
            _core = openvino.Core()
        return _core


def widened_model(core: Any, path: Path) -> Any:
    """What is compiled for a graph: its path, or a model, if it has to be changed first.

    Inputs and outputs of half precision become float32. The conversions are part of the model, and
    compiled for float32 they vanish.
    """
    inputs, outputs = read_interface(map_file(path))
    if all(spec.dtype not in HALF_PRECISIONS for spec in (*inputs, *outputs)):
        return str(path)
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    model = core.read_model(str(path))
    halves, edges = (Type.f16, Type.bf16), PrePostProcessor(model)
    for index, value in enumerate(model.inputs):
        if value.get_element_type() in halves:
            edges.input(index).tensor().set_element_type(Type.f32)
    for index, value in enumerate(model.outputs):
        if value.get_element_type() in halves:
            edges.output(index).tensor().set_element_type(Type.f32)
    return edges.build()


def problem(exc: Exception) -> str:
    """The line of OpenVINO's message that names the problem."""
    text = str(exc)
    if isinstance(exc, UnicodeDecodeError):
        text = exc.object.decode("utf-8", "backslashreplace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(_BOILERPLATE)]
    return (informative or lines or [type(exc).__name__])[0]
