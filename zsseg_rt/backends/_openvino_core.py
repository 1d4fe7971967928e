"""The process's one OpenVINO core, and which precisions it gives on this CPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from zsseg_rt.backends.base import BackendOptions, Choice
from zsseg_rt.common.arrays import HALF_PRECISIONS
from zsseg_rt.common.extras import unavailable
from zsseg_rt.common.files import ensure_home
from zsseg_rt.errors import PrecisionNotApplied
from zsseg_rt.onnx.reader import map_file, read_interface

# What its binding turns C++ exceptions into. A message that quotes bytes of a damaged graph becomes
# UnicodeDecodeError, a ValueError.
RAISED = (RuntimeError, ValueError, IndexError, OverflowError, MemoryError)
# Lines of OpenVINO's messages that name its own source code, not the problem.
_BOILERPLATE = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't", "Summary:")

# Dot products of 8-bit numbers; ARM's is called asimddp.
_INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_FLAG_LINES = ("flags", "features")
_CPU_INFO = Path("/proc/cpuinfo")
# Public name -> (the capability that the CPU must have, OpenVINO's name).
_PRECISIONS = {
    "float32": ("FP32", "f32"),
    "bfloat16": ("BF16", "bf16"),
    "float16": ("FP16", "f16"),
}

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
    ensure_home()
    try:
        import openvino
    except ImportError as exc:
        expected = "backend: expected the package openvino"
        raise unavailable(exc, "openvino", expected, "pip install openvino") from exc
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


def plugin_settings(
    precision: str, capabilities: list[str], options: BackendOptions
) -> dict[str, Any]:
    """OpenVINO's settings; what is not INT8 in an INT8 graph is the plugin's own choice."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": options.num_sessions}
    if options.node_times:
        settings["PERF_COUNT"] = True
    if options.num_threads:
        settings["INFERENCE_NUM_THREADS"] = options.num_threads
    if precision in ("auto", "int8"):
        # With BF16 the plugin's own choice stands: it knows whether the CPU only emulates it.
        if "BF16" not in capabilities:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        return settings
    needed, hint = _PRECISIONS.get(precision, ("", ""))
    if needed not in capabilities:
        offered = [name for name, (flag, _) in _PRECISIONS.items() if flag in capabilities]
        raise PrecisionNotApplied(
            f"precision: expected one this CPU computes in ({', '.join(offered)}; OpenVINO reports "
            f"{', '.join(capabilities)}), got {precision!r}. Use precision='auto'."
        )
    settings["INFERENCE_PRECISION_HINT"] = hint
    return settings


def offers(held: Collection[str], core: Any) -> list[Choice]:
    """What this CPU can do with the graphs that the bundle holds, its own choice first."""
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    computed = [name for name, (flag, _) in _PRECISIONS.items() if flag in capabilities]
    own = _own_precision(core)
    computed.sort(key=lambda name: name != own)
    narrow = [Choice(variant="int8", precision="int8")] if "int8" in held and has_vnni() else []
    # A bfloat16 graph is slower than the float32 one lowered, and never wholly in float32.
    if "float32" in held:
        halves = {"float16"} & set(held)
        return narrow + [
            Choice(variant=name if name in halves else "float32", precision=name)
            for name in computed
        ]
    return narrow + [
        Choice(variant=variant, precision=name)
        for variant, names in (("float16", ("float32", "float16")), ("bfloat16", ("bfloat16",)))
        if variant in held
        for name in names
        if name in computed
    ]


def _own_precision(core: Any) -> str:
    """What the plugin chooses by itself: it knows whether the CPU only emulates bfloat16."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "float32"
    return _public_name(core.get_property("CPU", "INFERENCE_PRECISION_HINT"))


def applied_precision(compiled: Any) -> str:
    """The precision the compiled model reports, by its public name."""
    return _public_name(compiled.get_property("INFERENCE_PRECISION_HINT"))


def _public_name(kind: Any) -> str:
    hints = {hint: name for name, (_, hint) in _PRECISIONS.items()}
    applied = str(kind.get_type_name())
    return hints.get(applied, applied)


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit numbers faster than floats: VNNI, AMX, or ARM's dot product.

    OpenVINO reports INT8 for every CPU; without these it is slower than float32 on many.
    """
    try:
        return multiplies_bytes(_CPU_INFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False


def multiplies_bytes(cpu_info: str) -> bool:
    """Whether a ``/proc/cpuinfo`` lists instructions for dot products of 8-bit numbers."""
    lines = (line for line in cpu_info.splitlines() if line.lower().startswith(_FLAG_LINES))
    return any(_INT8_FLAGS & set(line.split()) for line in lines)


def require_vnni() -> None:
    """Refuse INT8 on a CPU that gains nothing from it."""
    if not has_vnni():
        raise PrecisionNotApplied(
            "precision: expected a CPU with VNNI, AMX or ARM's dot product for 'int8', got one "
            "without, where INT8 is not faster. Use precision='auto'."
        )
