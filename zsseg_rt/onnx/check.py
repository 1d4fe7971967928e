"""Check a whole ONNX graph before any backend sees it: its types and sizes, node by node.

Runtimes trust the graphs they are given: a node without its inputs ends the process, and a constant
of two thousand million elements is allocated. OpenVINO reads and writes wherever an index points,
so an index is a constant inside its axis, or a place along an axis no longer than it: ArgMax,
ArgMin or TopK, through Cast, Reshape, Slice and Concat alone. No numbers are computed: sizes are
only moved. Those that follow from axes that are open until a run are bounded by the runtime alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.network import Network, Node, Weight, weight_of
from zsseg_rt.onnx.reader import DamagedError, check_shape, map_file, read_network
from zsseg_rt.onnx.rules import MOST_KNOWN, PLACES, Call, Shape, Value, constant, fixed
from zsseg_rt.onnx.table import OPERATORS, check_node

_OPEN = 16  # what an axis that is open until a run counts as; few are longer
_MOVES = ("Cast", "Concat", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_KEEPS_BOUNDS = ("Cast", "Concat", "Reshape", "Slice")
_FEW = 16  # numbers that an error lists


def check_graph(graph: Path | memoryview, what: str = "") -> Flow:
    """The network of an ONNX file, and what is known of its values, once all is checked.

    BackendError where a runtime may not have it.
    """
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


class Flow:
    """Types, shapes and bounds of a network's values, by name, node by node."""

    def __init__(self, network: Network) -> None:
        self.network, self.inputs, self.outputs = network, network.inputs, network.outputs
        # Inputs whose integers choose rows of a table, and how many rows there are. Whoever runs
        # the graph checks these integers first
        self.token_rows: dict[str, int] = {}
        self.values: dict[str, Value] = {}
        self._alike: dict[Any, Value] = {}  # of which nothing but type and shape matters
        for spec in network.inputs:
            self.add("graph inputs", spec.name, Value(spec.dtype, spec.shape, source=spec.name))
        for name, weight in network.weights.items():
            self.add("weights", name, self._shared(constant(weight.dtype, weight.array)))

    def run(self) -> Flow:
        """Follow all nodes; equal layers are judged once."""
        judged: dict[Any, list[Value]] = {}
        for node in self.network.nodes:
            inputs = self._inputs(node)
            outputs = len(node.outputs), node.outputs.count("")
            key = (node.kind, id(node.attributes), outputs, *map(id, inputs))
            if key not in judged:
                judged[key] = [self._shared(value) for value in self._judge(node, inputs)]
            self._add_results(node, judged[key])
        for spec in self.network.outputs:
            value = self.values.get(spec.name)
            if value is None:
                raise ValueError(
                    f"graph output {spec.name!r}: expected a value of the graph, got nothing"
                )
            if spec.dtype != value.dtype or not _agree(spec.shape, value.shape):
                raise ValueError(
                    f"graph output {spec.name!r}: expected what it computes, {value.dtype} "
                    f"{list(value.shape)}, got {spec.dtype} {list(spec.shape)} stated"
                )
        return self

    def follow(self, node: Node) -> list[Value]:
        """Judge a node by what is known of its inputs, and add its outputs."""
        results = self._judge(node, self._inputs(node))
        self._add_results(node, results)
        return results

    def _inputs(self, node: Node) -> list[Value | None]:
        values = self.values
        try:
            return [values[name] if name else None for name in node.inputs]
        except KeyError as exc:
            raise ValueError(
                f"{_where(node)}: expected inputs that earlier nodes make, got {exc}"
            ) from None

    def _add_results(self, node: Node, results: Sequence[Value]) -> None:
        for name, value in zip(node.outputs, results, strict=True):
            if name in self.values:
                self.add(_where(node), name, value)
            if name:
                self.values[name] = value

    def add(self, where: str, name: str, value: Value) -> None:
        """Add a value; a second one of its name is refused."""
        if not name or name in self.values:
            raise ValueError(f"{where}: expected a new name for each value, got {name!r}")
        self.values[name] = value

    def _shared(self, value: Value) -> Value:
        """One value for all of which nothing but type and shape matters."""
        is_small = value.array is not None and value.array.size <= _FEW
        if is_small or value.between or value.source or value.known is not None:
            return value
        return self._alike.setdefault((value.dtype, value.shape, value.array is None), value)

    def _judge(self, node: Node, inputs: Sequence[Value | None]) -> list[Value]:
        where = _where(node)
        opset = self.network.opset
        check_node(where, node, opset)
        if any(value is not None and 0 in value.shape and _is_empty(value) for value in inputs):
            raise ValueError(f"{where}: expected inputs with elements, got one of none")
        if node.kind == "Constant":
            return [_content(where, node.attributes)]
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
            check_shape(where, [size if fixed(size) else _OPEN for size in value.shape])
            if 0 in value.shape and len(value.shape) > 1:
                raise ValueError(
                    f"{where}: expected a result, got none: its shape is {list(value.shape)}"
                )
        return results


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


def _where(node: Node) -> str:
    return f"node {node.name or ', '.join(node.outputs)!r} ({node.kind})"


def _described(inputs: Sequence[Value | None], attributes: Mapping[str, Any]) -> str:
    """A node's inputs for an error: types, shapes or few integers, and attributes."""
    parts = []
    for value in inputs:
        few = value is not None and value.known is not None and value.known.size <= _FEW
        sizes = [] if value is None else value.known.tolist() if few else list(value.shape)  # type: ignore[union-attr]
        parts.append("nothing" if value is None else f"{value.dtype} {sizes}")
    return ", ".join([*parts, *(f"{name}={value}" for name, value in attributes.items())])


def _is_empty(value: Value) -> bool:
    """Whether a value of no elements is more than a list that says nothing, such as no scales."""
    return len(value.shape) > 1 or (value.array is None and value.known is None)


def _agree(stated: Shape, shape: Shape) -> bool:
    """Whether a file states a value's shape, or none."""
    return not stated or (
        len(stated) == len(shape)
        and all(a == b or not fixed(a, b) for a, b in zip(stated, shape, strict=True))
    )


def _content(where: str, attributes: Mapping[str, Any]) -> Value:
    """The value of a Constant node."""
    if len(attributes) != 1:
        raise ValueError(f"{where}: expected one value, got {', '.join(attributes) or 'nothing'}")
    value = next(iter(attributes.values()))
    if isinstance(value, Weight):
        return constant(value.dtype, value.array)
    array: npt.NDArray[Any] = compute("Constant", (), attributes)
    return constant(array.dtype.name, array)


def _move(node: Node, inputs: Sequence[Value | None], result: Value) -> None:
    """Note the integers of a result that its node only moves, and between which they lie."""
    data = [value for value in inputs if value is not None]
    data = data if node.kind == "Concat" else data[: 1 + (node.kind == "Gather")]
    if any(value.dtype not in PLACES for value in (result, *data)):
        return
    if node.kind in _KEEPS_BOUNDS:
        inside = [value.between for value in data if value.between]
        if len(inside) == len(data):
            result.between = (min(low for low, _ in inside), max(high for _, high in inside))
        result.source = data[0].source if len(data) == 1 else ""
    contents = [value.known for value in data]
    rest = [value.known if value is not None else None for value in inputs[len(data) :]]
    if any(each is None for each in contents) or not fixed(*result.shape):
        return
    if node.kind == "Cast":
        result.known = contents[0]
    elif node.kind != "Gather" or fixed(*contents[1].reshape(-1)):  # type: ignore[union-attr]
        moved = np.asarray(compute(node.kind, (*contents, *rest), node.attributes), object)
        result.known = moved if moved.size <= MOST_KNOWN else None


# --- the memory that a graph takes ---

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True, kw_only=True)
class GraphMemory:
    """Bytes that a graph takes."""

    weights: int  # All that is stored in it, once for all its sessions
    # Inputs, results and what lies between them, where that is most, per session. Runtimes that
    # fuse nodes need less
    activations: int


def graph_memory(path: Path, *, float_bytes: int, axes: Mapping[str, int]) -> GraphMemory:
    """Follow a graph's sizes, with floats of so many bytes; an axis without a size counts as 1."""
    try:
        network = read_network(map_file(path))
        inputs = tuple(
            replace(
                spec, shape=tuple(axes.get(d, 1) if isinstance(d, str) else d for d in spec.shape)
            )
            for spec in network.inputs
        )
        flow = Flow(replace(network, inputs=inputs)).run()
    except (OSError, ValueError) as exc:
        raise BackendError(f"{path}: expected an ONNX graph, got {exc}. Copy it again.") from exc
    sizes = {
        name: value.size * _width(value.dtype, float_bytes) for name, value in flow.values.items()
    }
    return _measure(flow.network, sizes)


def _width(dtype: str, float_bytes: int) -> int:
    if dtype.startswith("float8"):
        return 1
    return float_bytes if "float" in dtype else np.dtype(dtype).itemsize


def _measure(network: Network, sizes: Mapping[str, int]) -> GraphMemory:
    """Go through the nodes, and add and free what they make; ``sizes`` are bytes by name."""
    constants = set(network.weights)
    owners = {spec.name: spec.name for spec in network.inputs}  # whose memory a value lies in
    users = Counter(name for node in network.nodes for name in {*node.inputs} - {""})
    users.update(spec.name for spec in network.outputs)  # results count as read once more
    left = dict(users)
    weights = sum(sizes[name] for name in constants)
    alive = most = sum(sizes[name] for name in owners)
    for node in network.nodes:
        inputs = {name for name in node.inputs if name}
        if inputs <= constants:  # computed once, before the first run
            constants.update(node.outputs)
            weights += sum(sizes[name] for name in node.outputs) * (node.kind == "Constant")
            continue
        for name in filter(None, node.outputs):
            first = owners.get(node.inputs[0])
            if node.kind in _VIEWS and first is not None:
                owners[name] = first
                left[first] += users[name]
            else:
                owners[name] = name
                left.setdefault(name, 0)
                alive += sizes[name]
        most = max(most, alive)
        for owner in [owners[name] for name in inputs if name in owners]:
            left[owner] -= 1
            alive -= sizes[owner] * (left[owner] == 0)
    return GraphMemory(weights=weights, activations=most)
