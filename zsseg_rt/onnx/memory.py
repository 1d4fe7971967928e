"""The memory that a graph takes: its weights, and the most that is alive at one time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.check import Flow
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.reader import map_file, read_network

_FLOATS = (1, 10, 11, 16)  # TensorProto's float32, float16, float64, bfloat16
_WIDTHS = {4: 2, 5: 2, 6: 4, 7: 8, 12: 4, 13: 8}  # of other types; the rest have one byte
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
        flow = Flow(replace(network, inputs=inputs, stated={})).run()
    except (OSError, ValueError) as exc:
        raise BackendError(f"{path}: expected an ONNX graph, got {exc}. Copy it again.") from exc
    sizes = {
        name: value.size * (float_bytes if value.dtype in _FLOATS else _WIDTHS.get(value.dtype, 1))
        for name, value in flow.values.items()
    }
    return _measure(flow.network, sizes)


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
