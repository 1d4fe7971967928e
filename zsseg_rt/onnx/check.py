"""Check a whole ONNX graph before any backend sees it: its types and sizes, node by node.

Runtimes trust the graphs they are given: a node without its inputs ends the process, and a constant
of two thousand million elements is allocated. OpenVINO reads and writes wherever an index points,
so an index is a constant inside its axis, or a place along an axis no longer than it: ArgMax,
ArgMin or TopK, through Cast, Reshape, Slice and Concat alone. No numbers are computed: sizes are
only moved. Those that follow from axes that are open until a run are bounded by the runtime alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.network import Network, Node, Stated, Weight, weight_of
from zsseg_rt.onnx.operations import ONNX_TYPES
from zsseg_rt.onnx.reader import DamagedError, check_shape, map_file, read_network
from zsseg_rt.onnx.rules import MOST_KNOWN, PLACES, Call, Value
from zsseg_rt.onnx.table import OPERATORS, check_node

_DTYPES = {number: name for name, number in ONNX_TYPES.items()}
_OPEN = 16  # what an axis that is open until a run counts as; few are longer
_MOVES = ("Cast", "Concat", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_KEEPS_BOUNDS = ("Cast", "Concat", "Reshape", "Slice")
_FEW = 16  # numbers: of a longer constant that is no index, only type and shape matter


@dataclass(frozen=True, kw_only=True)
class GraphHeader:
    """The interface of an ONNX graph."""

    inputs: tuple[TensorSpec, ...]  # In graph order; dynamic axes are names
    outputs: tuple[TensorSpec, ...]  # In graph order
    # Inputs whose integers choose rows of a table, and how many rows there are. Whoever runs the
    # graph checks these integers first
    token_rows: Mapping[str, int] = field(default_factory=dict)


def check_graph(path: Path) -> GraphHeader:
    """Check an ONNX file and read its interface; BackendError where a runtime may not have it."""
    return header_of(checked_flow(path))


def checked_flow(graph: Path | memoryview, what: str = "") -> Flow:
    """The network of an ONNX file, and what is known of its values, once all is checked."""
    where = what or str(graph)
    try:
        content = map_file(graph) if isinstance(graph, Path) else graph
        return Flow(read_network(content)).run()
    except (OSError, DamagedError) as exc:
        raise BackendError(
            f"{where}: expected an ONNX graph, got {exc}. Copy the bundle again."
        ) from exc
    except ValueError as exc:
        raise BackendError(
            f"{where}: {exc}. Export the model again, and do not use a graph of unknown origin."
        ) from exc


def header_of(flow: Flow) -> GraphHeader:
    """A checked graph's interface."""
    network = flow.network
    return GraphHeader(inputs=network.inputs, outputs=network.outputs, token_rows=flow.token_rows)


class Flow:
    """Types, shapes and bounds of a network's values, by name, node by node."""

    def __init__(self, network: Network) -> None:
        self.network, self.token_rows = network, dict[str, int]()
        self.values: dict[str, Value] = {}
        self._alike: dict[Any, Value] = {}  # weights, by type and shape
        self._judged: dict[Any, list[Value]] = {}  # nodes, by operator, attributes and inputs
        for spec in network.inputs:
            stated = network.stated.get(spec.name) or _stated_by(spec)
            if stated.shape is None:
                raise ValueError(f"graph input {spec.name!r}: expected a shape, got none")
            self._name("graph inputs", spec.name)
            self.values[spec.name] = Value(stated.dtype, stated.shape, source=spec.name)
        for name, weight in network.weights.items():
            self._name("weights", name)
            self.values[name] = self.constant(weight)

    def run(self) -> Flow:
        """Follow all nodes."""
        for index in range(len(self.network.nodes)):
            self.follow(index)
        lost = [spec.name for spec in self.network.outputs if spec.name not in self.values]
        if lost:
            raise ValueError(
                f"graph output {lost[0]!r}: expected a value of the graph, got nothing"
            )
        return self

    def follow(self, index: int) -> None:
        """Judge a node by what is known of its inputs, and add its outputs."""
        node, values, stated = self.network.nodes[index], self.values, self.network.stated
        try:
            inputs = [values[name] if name else None for name in node.inputs]
        except KeyError as exc:
            raise ValueError(
                f"{_where(node, index)}: expected inputs that earlier nodes make, got {exc}"
            ) from None
        key = (node.kind, id(node.attributes), len(node.outputs), *map(id, inputs))
        results = self._judged.get(key)
        if results is None or "" in node.outputs:  # equal layers are judged once
            results = self._judged[key] = self._judge(_where(node, index), node, inputs)
        for name, value in zip(node.outputs, results, strict=True):
            if name and name in values:
                self._name(_where(node, index), name)
            if name in stated and not _agree(stated[name], value):
                shape = stated[name].shape
                raise ValueError(
                    f"{_where(node, index)}: {name}: expected the type that it computes, "
                    f"{list(value.shape)} of data type {value.dtype}, got "
                    f"{shape if shape is None else list(shape)} of {stated[name].dtype} stated"
                )
            values[name] = value

    def _judge(self, where: str, node: Node, inputs: Sequence[Value | None]) -> list[Value]:
        opset = self.network.opset
        check_node(where, node, opset)
        if any(value is not None and 0 in value.shape and _is_empty(value) for value in inputs):
            raise ValueError(f"{where}: expected inputs with elements, got one of none")
        if node.kind == "Constant":
            return [self.constant(_content(where, node.attributes))]
        call = Call(node.kind, opset, node.attributes, len(node.outputs), self.token_rows)
        try:
            result = OPERATORS[node.kind].rule(call, *inputs)
        except ValueError as exc:
            raise ValueError(f"{where}: {exc}, got {_described(inputs, node.attributes)}") from exc
        if isinstance(result, tuple):
            result = Value(inputs[0].dtype, result)  # type: ignore[union-attr]
        results: list[Value] = result if isinstance(result, list) else [result]
        if node.kind in _MOVES:
            _move(node, inputs, results[0])
        for value in results:
            shape = value.shape
            fixed = [size for size in shape if size is not None]
            check_shape(where, [*fixed, *[_OPEN] * shape.count(None)])
            if 0 in shape and len(shape) > 1:
                raise ValueError(
                    f"{where}: expected a result, got none: its shape is {list(shape)}"
                )
        return [self._shared(value) for value in results]

    def constant(self, weight: Weight) -> Value:
        """A weight as a value, with its content."""
        array, dtype = weight.array, ONNX_TYPES[weight.dtype]
        value = self._alike.get((dtype, array.shape, False)) if array.size > _FEW else None
        return value or self._shared(Value(dtype, array.shape, array=array))

    def _shared(self, value: Value) -> Value:
        """One value for all of which nothing but type and shape matters."""
        if value.holds_indices or value.between or value.source or value.known is not None:
            return value
        if value.array is not None and value.array.size <= _FEW:
            return value
        return self._alike.setdefault((value.dtype, value.shape, value.array is None), value)

    def _name(self, where: str, name: str) -> None:
        """Refuse a second value of one name."""
        if not name or name in self.values:
            raise ValueError(f"{where}: expected a new name for each value, got {name!r}")


def with_floats(network: Network) -> Network:
    """The network with the names of its float32 values, as far as types are followed."""
    values = Flow(network).run().values
    floats = frozenset(name for name, value in values.items() if _DTYPES[value.dtype] == "float32")
    return replace(network, floats=floats)


def in_opset(flow: Flow, opset: int) -> Network:
    """A network of an operator set before 18 in one of 18 to 20, with the same results."""
    network = flow.network
    nodes, weights = [], dict(network.weights)
    for node in network.nodes:
        attributes, inputs = dict(node.attributes), node.inputs
        if node.kind == "Split" and "split" not in attributes and len(inputs) == 1:
            attributes["num_outputs"] = len(node.outputs)
        elif node.kind == "Dropout":
            attributes.pop("ratio", None)
        elif node.kind in ("Softmax", "LogSoftmax") and network.opset < 13:
            last = len(flow.values[inputs[0]].shape) - 1
            if attributes.setdefault("axis", 1) not in (-1, last):
                raise ValueError(f"{node.kind} {node.name!r} is over several axes.")
        for name in ("axes", "split"):
            if name in attributes and node.kind != "Resize":
                weight = f"{node.outputs[0]}.{name}"
                weights[weight] = weight_of(np.array(attributes.pop(name), np.int64))
                inputs = (*inputs, weight)
        nodes.append(node._replace(inputs=inputs, attributes=attributes))
    return replace(network, nodes=tuple(nodes), weights=weights, opset=opset)


def _stated_by(spec: Any) -> Stated:
    shape = tuple(size if isinstance(size, int) else None for size in spec.shape)
    return Stated(ONNX_TYPES[spec.dtype], shape)


def _where(node: Node, index: int) -> str:
    return f"node {node.name or index!r} ({node.kind})"


def _described(inputs: Sequence[Value | None], attributes: Mapping[str, Any]) -> str:
    """A node's inputs for an error: types, shapes or few integers, and attributes."""
    parts = []
    for value in inputs:
        few = value is not None and value.known is not None and value.known.size <= _FEW
        sizes = [] if value is None else value.known.tolist() if few else list(value.shape)  # type: ignore[union-attr]
        parts.append("nothing" if value is None else f"{_DTYPES[value.dtype]} {sizes}")
    return ", ".join([*parts, *(f"{name}={value}" for name, value in attributes.items())])


def _is_empty(value: Value) -> bool:
    """Whether a value of no elements is more than a list that says nothing, such as no scales."""
    return len(value.shape) > 1 or (value.array is None and value.known is None)


def _agree(stated: Stated, value: Value) -> bool:
    if stated.dtype not in (0, value.dtype):
        return False
    if stated.shape is None or stated.shape == value.shape:
        return True
    return len(stated.shape) == len(value.shape) and all(
        a is None or b is None or a == b for a, b in zip(stated.shape, value.shape, strict=True)
    )


def _content(where: str, attributes: Mapping[str, Any]) -> Weight:
    """The value of a Constant node."""
    if len(attributes) != 1:
        raise ValueError(f"{where}: expected one value, got {', '.join(attributes) or 'nothing'}")
    value = next(iter(attributes.values()))
    if isinstance(value, Weight):
        return value
    array: npt.NDArray[Any] = compute("Constant", (), attributes)
    return Weight(array, array.dtype.name)


def _move(node: Node, inputs: Sequence[Value | None], result: Value) -> None:
    """Note the integers of a result that its node only moves, and between which they lie."""
    data = [value for value in inputs if value is not None]
    data = data if node.kind == "Concat" else data[: 1 + (node.kind == "Gather")]
    if any(value.dtype not in PLACES for value in (result, *data)):
        return
    if node.kind in _KEEPS_BOUNDS:
        bounds = [value.bounds() for value in data]
        inside = [pair for pair in bounds if pair]
        if len(inside) == len(bounds):
            result.between = (min(low for low, _ in inside), max(high for _, high in inside))
        result.source = data[0].source if len(data) == 1 else ""
    contents = [value.known for value in data]
    rest = [value.known if value is not None else None for value in inputs[len(data) :]]
    if any(each is None for each in contents) or None in result.shape:
        return
    if node.kind == "Cast":
        result.moved = contents[0]
    elif node.kind != "Gather" or None not in contents[1].reshape(-1):  # type: ignore[union-attr]
        moved = np.asarray(compute(node.kind, (*contents, *rest), node.attributes), object)
        result.moved = moved if moved.size <= MOST_KNOWN else None
