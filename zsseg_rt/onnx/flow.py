"""Follow types and sizes through a network, node by node, and judge each node by them.

OpenVINO reads and writes wherever an index points, so an index is a constant inside its axis, or a
place along an axis no longer than it: ArgMax, ArgMin or TopK, through Cast, Reshape, Slice and
Concat alone. No numbers are computed: sizes are only moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.network import Network, Node, Stated, Weight, weight_of
from zsseg_rt.onnx.operations import ONNX_TYPES
from zsseg_rt.onnx.reader import check_shape
from zsseg_rt.onnx.rules import PLACES, Call, Value
from zsseg_rt.onnx.table import OPERATORS, check_node

_DTYPES = {number: name for name, number in ONNX_TYPES.items()}
_OPEN = 16  # what an axis that is open until a run counts as; few are longer
_MOVES = ("Cast", "Concat", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_KEEPS_BOUNDS = ("Cast", "Concat", "Reshape", "Slice")
_FEW = 16  # numbers: of a longer constant that is no index, only type and shape matter


class Flow:
    """Types, shapes and bounds of a network's values, node by node.

    Attributes:
        values: By name.
        token_rows: Inputs whose integers choose rows of a table, and the rows there are.
    """

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
        if node.kind in ("Shape", "Size", *_MOVES):
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
    if node.kind in ("Shape", "Size"):
        sizes = inputs[0].shape if inputs[0] is not None else ()
        if node.kind == "Shape":
            attributes = node.attributes
            part = sizes[slice(attributes.get("start", 0), attributes.get("end"))]
            result.known = np.array(part, object)
        elif None not in sizes:
            result.known = np.array(math.prod(size or 0 for size in sizes), object)
        return
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
        result.known = np.asarray(contents[0])
    elif node.kind != "Gather" or None not in contents[1].reshape(-1):  # type: ignore[union-attr]
        result.known = np.asarray(compute(node.kind, (*contents, *rest), node.attributes), object)
