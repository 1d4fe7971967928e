"""Check a whole ONNX graph before any backend sees it.

Runtimes trust the graphs they are given: a node without its inputs ends the process, a constant of
two thousand million elements is allocated, weights are read from any file a graph names. A graph
passes here if it uses the table's operators on tensors whose values are in the file, with indices
inside their axes and sizes that fit. Sizes that follow from fixed inputs are bounded; those that
follow from axes that are open until a run are bounded by the runtime alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.flow import Flow
from zsseg_rt.onnx.reader import DamagedError, map_file, read_network


@dataclass(frozen=True, kw_only=True)
class GraphHeader:
    """The interface of an ONNX graph."""

    inputs: tuple[TensorSpec, ...]  # In graph order; dynamic axes are names
    outputs: tuple[TensorSpec, ...]  # In graph order
    # Inputs whose integers choose rows of a table, and how many rows there are. Whoever runs the
    # graph checks these integers first
    token_rows: Mapping[str, int] = field(default_factory=dict)


def check_graph(path: Path) -> GraphHeader:
    """Check an ONNX file and read its interface.

    Refused are: external data, sparse weights, functions, subgraphs, training information, operator
    sets, operators and attributes that encoders do not need, nodes with too few or too many inputs
    or outputs, values used before they are made or made twice, weights whose size is not that of
    their data, sizes beyond ``reader.MAX_ELEMENTS`` or that contradict each other or what is
    stated, and indices that are not known to be inside their axis.
    """
    return header_of(checked_flow(map_graph(path), str(path)))


def map_graph(path: Path) -> memoryview:
    """Map a graph's file."""
    try:
        return map_file(path)
    except (OSError, ValueError) as exc:
        raise BackendError(
            f"{path}: expected an ONNX graph, got {exc}. Copy the bundle again."
        ) from exc


def checked_flow(content: memoryview, what: str) -> Flow:
    """The network of an ONNX file, and what is known of its values, once all is checked."""
    try:
        return Flow(read_network(content)).run()
    except DamagedError as exc:
        raise BackendError(
            f"{what}: expected an ONNX graph, got {exc}. Copy the file again."
        ) from exc
    except ValueError as exc:
        raise BackendError(
            f"{what}: {exc}. Export the model again, and do not use a graph of unknown origin."
        ) from exc


def header_of(flow: Flow) -> GraphHeader:
    """A checked graph's interface."""
    network = flow.network
    return GraphHeader(inputs=network.inputs, outputs=network.outputs, token_rows=flow.token_rows)
