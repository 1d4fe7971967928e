"""What OpenVINO tells of a compiled model's nodes: types, precisions, times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.backends.base import OUTSIDE_NODES, LayerInfo, NodeTime
from zsseg_rt.errors import BackendError, PrecisionNotApplied
from zsseg_rt.onnx.reader import map_file, quantised_layers

_MULTIPLY = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")
# OpenVINO's element types -> NumPy's names.
_NUMPY_NAMES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}


@dataclass
class PastRuns:
    """The runs of a compiled model so far.

    Attributes:
        count: How many there were.
        ms: Their milliseconds, from call to return.
    """

    count: int = 0
    ms: float = 0.0


def describe_layer(operation: Any) -> LayerInfo:
    """Name, type and precision of a node of the runtime model."""
    told = operation.get_rt_info()
    names = str(told["originalLayersNames"].value) if "originalLayersNames" in told else ""
    kind = str(told["layerType"].value) if "layerType" in told else operation.get_type_name()
    computed = str(told["runtimePrecision"].value) if "runtimePrecision" in told else ""
    name = names.split(",")[0] or operation.get_friendly_name()
    return LayerInfo(name=name, type=kind, precision=_NUMPY_NAMES.get(computed, computed))


def require_int8(compiled: Any, graph_path: Path) -> str:
    """``"int8"`` if every layer that a graph holds in INT8 really runs in it.

    Raises:
        PrecisionNotApplied: Fewer do; the message counts them.
    """
    promised = quantised_layers(map_file(graph_path))
    layers = map(describe_layer, compiled.get_runtime_model().get_ordered_ops())
    multiply = [layer for layer in layers if layer.type in _MULTIPLY]
    found = sum(layer.precision in ("int8", "uint8") for layer in multiply)
    if found < promised:
        raise PrecisionNotApplied(
            f"precision: expected {promised} layers of {graph_path.name} in 'int8', but OpenVINO "
            f"compiled {found} of them for it on this CPU. Use precision='auto'."
        )
    return "int8"


def node_times(
    compiled: Any, request: Any, run: Callable[[], object], runs: int, past: PastRuns
) -> tuple[NodeTime, ...]:
    """Time every node of a compiled model, and what the same runs took beyond them.

    Counters are means since the model was compiled, and both they and every run that they count
    are cut to whole microseconds: a node's time is too short by up to two. If there were few runs
    before, such as the slow first one, their share is taken out.
    """
    if str(compiled.get_property("PERF_COUNT")).upper() not in ("YES", "TRUE"):
        raise BackendError(
            "session: expected a graph that counts times, got one that does not. Load it with "
            "BackendOptions(node_times=True)."
        )
    told, done, done_ms = dict(_counters(request)), past.count, past.ms
    if done > runs:  # cutting would cost more than the first runs' share
        told, done, done_ms = {}, 0, 0.0
    for _ in range(runs):
        run()
    counted = past.count - done
    named, found = _names(compiled), []
    for name, (kind, mean_ms) in _counters(request):
        ms = mean_ms
        if name in told:
            ms = max(0.0, (mean_ms * past.count - told[name][1] * done) / counted)
        found.append(NodeTime(name=named.get(name, ""), type=kind, ms=ms))
    rest = (past.ms - done_ms) / counted - sum(node.ms for node in found)
    return (*found, NodeTime(name=OUTSIDE_NODES, type="", ms=max(0.0, rest)))


def _counters(request: Any) -> Iterator[tuple[str, tuple[str, float]]]:
    """Name, type and mean milliseconds of the nodes that ran."""
    for info in request.get_profiling_info():
        if str(info.status).endswith("EXECUTED"):
            yield info.node_name, (info.node_type, info.real_time.total_seconds() * 1e3)


def _names(compiled: Any) -> dict[str, str]:
    """The ONNX name of each node that has one; what OpenVINO invents is called by its own type."""
    names = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        told = operation.get_rt_info()
        originals = str(told["originalLayersNames"].value) if "originalLayersNames" in told else ""
        known = [name for name in originals.split(",") if "/" in name or name.startswith("node_")]
        attention = [name for name in known if "attention/" in name]
        if known:
            names[operation.get_friendly_name()] = (attention or known)[-1]
    return names
