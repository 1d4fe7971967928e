"""What a graph takes in memory: its weights, and the most that is alive at one time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from zsseg_rt.backends.graph_check.flow import Flow, read_attributes
from zsseg_rt.backends.graph_check.graph import Graph, Stated, map_file, read_graph
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BackendError

_FLOATS = (1, 10, 11, 16)  # TensorProto's float32, float16, float64, bfloat16
_WIDTHS = {4: 2, 5: 2, 6: 4, 7: 8, 12: 4, 13: 8}  # of other types; the rest have one byte
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True, kw_only=True)
class GraphMemory:
    """Bytes that a graph takes.

    Attributes:
        weights: All that is stored in it, once for all its sessions.
        activations: Inputs, results and what lies between them, where that is most, per session.
            Runtimes that fuse nodes need less.
        kept: What backend torch keeps for runs on a GPU, per session: queries, keys and values that
            end in constant rows, such as prompts', and what the first block reads around the class
            token.
    """

    weights: int
    activations: int
    kept: int


def graph_memory(path: Path, *, float_bytes: int, axes: Mapping[str, int]) -> GraphMemory:
    """Follow a graph's sizes, and find the place where most of them are needed.

    Args:
        path: An ONNX file.
        float_bytes: Bytes of a floating-point number in the precision that it is computed in.
        axes: Sizes of its named axes; one that is absent counts as 1.

    Raises:
        BackendError: It is no graph whose sizes can be followed.
    """
    try:
        graph = read_graph(map_file(path))
        return _measure(_with_sizes(graph, axes), float_bytes)
    except (OSError, ValueError, KeyError) as exc:
        raise BackendError(f"{path}: expected an ONNX graph, got {exc}. Copy it again.") from exc


def _with_sizes(graph: Graph, axes: Mapping[str, int]) -> Graph:
    inputs = [
        TensorSpec(
            name=spec.name,
            dtype=spec.dtype,
            shape=tuple(axes.get(d, 1) if isinstance(d, str) else d for d in spec.shape),
        )
        for spec in graph.inputs
    ]
    known = {s.name: Stated(graph.stated[s.name].dtype, (*map(int, s.shape),)) for s in inputs}
    return replace(graph, inputs=tuple(inputs), stated=known)


def _measure(graph: Graph, float_bytes: int) -> GraphMemory:
    opset = max(version for domain, version in graph.opsets if domain in ("", "ai.onnx"))
    flow, constants = Flow(graph, opset), {tensor.name for tensor in graph.weights}
    weights = sum(_bytes(flow, tensor.name, float_bytes) for tensor in graph.weights)
    held = {spec.name: spec.name for spec in graph.inputs}  # a value, and whose memory it lies in
    users = _count_users(graph)
    left = dict(users)
    alive = sum(_bytes(flow, spec.name, float_bytes) for spec in graph.inputs)
    most, extended, start = alive, 0, 0
    for node in graph.nodes:
        attributes = read_attributes(node.name, node)
        if node.op_type == "Constant":
            value = attributes.get("value")
            if value is not None:
                flow.constant(node.outputs[0], value)
                weights += _bytes(flow, node.outputs[0], float_bytes)
                constants.add(node.outputs[0])
                continue
            raise ValueError(f"a Constant {node.name!r} that is no tensor")
        flow.follow(node.name, node, attributes)
        inputs = [name for name in node.inputs if name]
        if all(name in constants for name in inputs):  # computed once, before the first run
            constants.update(node.outputs)
            continue
        if node.op_type == "Concat" and constants.intersection(inputs):
            rows = _bytes(flow, node.outputs[0], float_bytes)
            if attributes["axis"] == 2:  # of keys and values; their queries lie beside them
                extended += 3 * rows // 2
            elif attributes["axis"] == 1:  # before a norm, and after it
                start = max(start, 2 * rows)
        for name in filter(None, node.outputs):
            is_view = node.op_type in _VIEWS and inputs[0] in held
            held[name] = held[inputs[0]] if is_view else name
            if is_view:
                left[held[name]] = left.get(held[name], 0) + users.get(name, 0)
            else:
                alive += _bytes(flow, name, float_bytes)
        most = max(most, alive)
        alive -= _free(
            flow, float_bytes, {name: held[name] for name in inputs if name in held}, left
        )
    return GraphMemory(weights=weights, activations=most, kept=extended + start)


def _count_users(graph: Graph) -> dict[str, int]:
    """By value, how many nodes read it; the graph's results count as read once more."""
    users = {spec.name: 1 for spec in graph.outputs}
    for node in graph.nodes:
        for name in {name for name in node.inputs if name}:
            users[name] = users.get(name, 0) + 1
    return users


def _free(flow: Flow, float_bytes: int, read: Mapping[str, str], left: dict[str, int]) -> int:
    """Note that a node has read values; returns the bytes that nothing will read again."""
    freed = 0
    for root in read.values():
        left[root] -= 1
        if left[root] == 0:
            freed += _bytes(flow, root, float_bytes)
    return freed


def _bytes(flow: Flow, name: str, float_bytes: int) -> int:
    value = flow.values[name]
    return value.size * (float_bytes if value.dtype in _FLOATS else _WIDTHS.get(value.dtype, 1))
