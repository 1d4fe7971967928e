"""Check a whole ONNX graph before any backend sees it.

Runtimes trust the graphs they are given: a node without its inputs ends the process, a constant of
two thousand million elements is allocated, weights are read from any file a graph names. A graph
passes here if it uses known operators on tensors whose values are in the file, with indices inside
their axes and sizes that fit. Sizes that follow from fixed inputs are bounded; those that follow
from axes that are open until a run are bounded by the runtime alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsseg_rt.backends.graph_check.flow import Flow, read_attributes
from zsseg_rt.backends.graph_check.graph import Graph, Node, WeightTensor, map_file, read_graph
from zsseg_rt.backends.graph_check.operators import OPSETS, input_counts, output_counts
from zsseg_rt.backends.graph_check.value import check_shape, check_weight
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BackendError

_STANDARD = ("", "ai.onnx")
_IR_VERSIONS = range(4, 15)
_NEWEST_OPSET = 1000  # of a foreign domain that is named but not used
_MAX_NODES = 1 << 14  # ViT-L has 1,500; runtimes walk the graph recursively


@dataclass(frozen=True, kw_only=True)
class GraphHeader:
    """The interface of an ONNX graph.

    Attributes:
        inputs: In graph order; dynamic axes are names.
        outputs: In graph order.
        token_rows: Inputs whose integers choose rows of a table, and how many rows there are.
            Whoever runs the graph checks these integers first.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    token_rows: Mapping[str, int] = field(default_factory=dict)


def check_graph(path: Path) -> GraphHeader:
    """Check an ONNX file and read its interface.

    Refused are: external data, sparse weights, functions, subgraphs, training information, operator
    sets, operators and attributes that encoders do not need, nodes with too few or too many inputs
    or outputs, values used before they are made or made twice, weights whose size is not that of
    their data, sizes beyond ``value.MAX_ELEMENTS`` or that contradict each other or what is stated,
    and indices that are not known to be inside their axis.
    """
    try:
        content = map_file(path)
    except (OSError, ValueError) as exc:
        raise BackendError(
            f"{path}: expected an ONNX graph, got {exc}. Copy the bundle again."
        ) from exc
    return check_model(content, str(path))


def check_model(content: memoryview, what: str) -> GraphHeader:
    """Check the content of an ONNX file as :func:`check_graph` does; errors call it ``what``."""
    try:
        graph = read_graph(content)
    except ValueError as exc:
        raise BackendError(
            f"{what}: expected an ONNX graph, got {exc}. Copy the file again."
        ) from exc
    try:
        token_rows = _check(graph)
    except ValueError as exc:
        raise BackendError(
            f"{what}: {exc}. Export the model again, and do not use a graph of unknown origin."
        ) from exc
    return GraphHeader(inputs=graph.inputs, outputs=graph.outputs, token_rows=token_rows)


def _check(graph: Graph) -> dict[str, int]:
    """Refuse what is not sound; returns the inputs that choose rows of tables, with the rows."""
    opset = _check_versions(graph)
    if graph.extras:
        raise ValueError(f"graph: expected only nodes and weights, got {', '.join(graph.extras)}")
    if not graph.inputs or not graph.outputs or len(graph.nodes) > _MAX_NODES:
        raise ValueError(
            f"graph: expected inputs, outputs and at most {_MAX_NODES} nodes, got "
            f"{len(graph.inputs)}, {len(graph.outputs)} and {len(graph.nodes)}"
        )
    for spec in (*graph.inputs, *graph.outputs):
        check_shape(f"tensor {spec.name!r}", [size for size in spec.shape if type(size) is int])
    for tensor in graph.weights:
        check_weight(f"weight {tensor.name!r}", tensor)
    made: set[str] = set()
    _add_values("graph inputs", made, [spec.name for spec in graph.inputs])
    _add_values("weights", made, [tensor.name for tensor in graph.weights])
    flow = Flow(graph, opset)
    for index, node in enumerate(graph.nodes):
        where = f"node {node.name or index!r} ({node.op_type})"
        _check_node(where, node, opset, made)
        attributes = read_attributes(where, node)
        if node.op_type == "Constant":
            flow.constant(node.outputs[0], _constant(where, attributes))
        else:
            flow.follow(where, node, attributes)
    lost = [spec.name for spec in graph.outputs if spec.name not in made]
    if lost:
        raise ValueError(f"graph output {lost[0]!r}: expected a value of the graph, got nothing")
    return flow.token_rows


def _check_versions(graph: Graph) -> int:
    """The version of the standard operator set."""
    if graph.ir_version not in _IR_VERSIONS:
        raise ValueError(
            f"ir_version: expected {_IR_VERSIONS[0]} to {_IR_VERSIONS[-1]}, got {graph.ir_version}"
        )
    # onnx.compose lists a set once for each graph that it merged.
    standard = sorted({version for domain, version in graph.opsets if domain in _STANDARD})
    if len(standard) != 1 or standard[0] not in OPSETS:
        raise ValueError(
            f"opset_import: expected one version of {OPSETS[0]} to {OPSETS[-1]} for the standard "
            f"operators, got {standard}"
        )
    if any(not 0 <= version <= _NEWEST_OPSET for _, version in graph.opsets):
        raise ValueError(f"opset_import: expected at most {_NEWEST_OPSET}, got {graph.opsets}")
    return standard[0]


def _check_node(where: str, node: Node, opset: int, made: set[str]) -> None:
    """Check a node by itself and against the values made so far; its outputs join them."""
    inputs = input_counts(node.op_type, opset)
    if node.domain not in _STANDARD or node.overload or inputs is None:
        domain = f" of domain {node.domain!r}" if node.domain else ""
        raise ValueError(
            f"{where}: expected an operator that encoders use, in the standard operator set "
            f"{opset}, got {node.op_type!r}{domain}. Cut the graph before that node, or replace it"
        )
    _check_count(where, "inputs", node.inputs, inputs)
    _check_count(where, "outputs", node.outputs, output_counts(node.op_type))
    missing = [name for name in node.inputs if name and name not in made]
    if missing:
        raise ValueError(f"{where}: expected inputs that earlier nodes make, got {missing[0]!r}")
    _add_values(where, made, [name for name in node.outputs if name])


def _check_count(where: str, what: str, names: tuple[str, ...], expected: tuple[int, int]) -> None:
    fewest, most = expected
    given = sum(1 for name in names[:fewest] if name)
    if given < fewest or len(names) > most:
        raise ValueError(
            f"{where}: expected {fewest} to {most} {what}, got {[name or None for name in names]}"
        )


def _add_values(where: str, made: set[str], names: list[str]) -> None:
    for name in names:
        if not name or name in made:
            raise ValueError(f"{where}: expected a new name for each value, got {name!r}")
        made.add(name)


def _constant(where: str, attributes: dict[str, Any]) -> WeightTensor:
    """The value of a Constant node."""
    if len(attributes) != 1:
        raise ValueError(f"{where}: expected one value, got {', '.join(attributes) or 'nothing'}")
    name, value = next(iter(attributes.items()))
    if isinstance(value, WeightTensor):
        return value
    values = value if isinstance(value, list) else [value]
    code, data_type = ("q", 7) if name in ("value_int", "value_ints") else ("f", 1)
    try:
        content = struct.pack(f"<{len(values)}{code}", *values)
    except struct.error as exc:
        raise ValueError(f"{where}: {name}: expected numbers, got {exc}") from exc
    dims = (len(values),) if isinstance(value, list) else ()
    return WeightTensor(
        name="",
        data_type=data_type,
        dims=dims,
        stored={"raw_data": memoryview(content)},
        external=False,
        has_strings=False,
    )
