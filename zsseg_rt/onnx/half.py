"""Turn a float32 network into one in half precision that keeps what overflows in float32.

That is norms, softmax and what is written in a scope ``float32``, between explicit casts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import CheckpointError
from zsseg_rt.onnx.network import Network, Node, Weight
from zsseg_rt.onnx.operations import ONNX_TYPES

# Squares and exponentials: x * x overflows float16 from |x| = 256 on.
_WIDE = {"LayerNormalization", "InstanceNormalization", "Softmax"}
_WIDE |= {"ReduceL2", "ReduceSum", "ReduceMean", "Sqrt"}
_MOVES = {"Slice", "Gather", "Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Identity"}
_WIDE_IN = {
    "float16": _WIDE,
    "bfloat16": _WIDE | {"ConvTranspose"},
}  # TensorRT has none in bfloat16
_LARGEST = float(np.finfo(np.float16).max)


def to_half(network: Network, kind: str = "float16", *, half: Collection[str] = ()) -> Network:
    """The same network in ``kind``, float16 or bfloat16; inputs and outputs in ``half`` as well."""
    return _Converter(network, kind, half).convert()


class _Converter:
    def __init__(self, network: Network, kind: str, half: Collection[str]) -> None:
        self._network, self._kind = network, kind
        self._floats = network.floats
        self._half = set(half) & self._floats
        inputs = {spec.name for spec in network.inputs}
        self._in_float32 = (inputs & self._floats) - self._half
        self._readers: dict[str, list[Node]] = {}
        for node in network.nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._casts: dict[tuple[str, str], str] = {}

    def convert(self) -> Network:
        outputs = {spec.name for spec in self._network.outputs}
        for node in self._network.nodes:
            self._convert(node, outputs)
        return replace(
            self._network,
            inputs=tuple(map(self._spec, self._network.inputs)),
            outputs=tuple(map(self._spec, self._network.outputs)),
            nodes=tuple(self._nodes),
            weights=self._weights,
            floats=frozenset(self._in_float32),
        )

    def _spec(self, spec: TensorSpec) -> TensorSpec:
        return replace(spec, dtype=self._kind) if spec.name in self._half else spec

    def _convert(self, node: Node, outputs: set[str]) -> None:
        wide = self._stays_float32(node)
        kind = "float32" if wide else self._kind
        inputs = tuple(self._take(name, kind) for name in node.inputs)
        names, casts = list(node.outputs), []
        for index, name in enumerate(node.outputs):
            if name not in self._floats:
                continue
            if name in outputs and wide == (name in self._half):
                names[index], cast = self._cast_output(name)
                casts.append(cast)
            elif wide:
                self._in_float32.add(name)
        attributes = _retyped(node, kind)
        self._nodes += [Node(node.name, node.kind, inputs, tuple(names), attributes), *casts]

    def _cast_output(self, name: str) -> tuple[str, Node]:
        """Give an output of the graph the type it is stated with; both stay available inside."""
        narrow = name in self._half
        inside, outside = ("float32", self._kind) if narrow else (self._kind, "float32")
        self._casts[name, inside] = f"{name}.{inside}"
        if not narrow:
            self._in_float32.add(name)
        return f"{name}.{inside}", _cast(f"{name}.{inside}", name, outside)

    def _stays_float32(self, node: Node) -> bool:
        if node.kind in _WIDE_IN[self._kind] or "float32" in node.name.partition("/")[0].split("."):
            return True
        data = [name for name in node.inputs if name in self._floats]
        computed = [name for name in data if name not in self._network.weights]
        if node.kind == "Div":  # the division by a norm
            return any(name in self._in_float32 for name in computed)
        if node.kind not in _MOVES or not computed or self._only_leaves_as_half(node):
            return False
        return set(computed) <= self._in_float32

    def _only_leaves_as_half(self, node: Node) -> bool:
        """Whether results are moved out of the graph in float16: parts then share one cast."""
        return all(
            all(r.kind in _MOVES and self._only_leaves_as_half(r) for r in self._readers[name])
            if name in self._readers
            else name in self._half
            for name in node.outputs
        )

    def _take(self, name: str, kind: str) -> str:
        """The name under which a value is available as ``kind``; casts it at most once."""
        if name in self._network.weights:
            return self._take_weight(name, kind)
        if name not in self._floats or (name in self._in_float32) == (kind == "float32"):
            return name
        if (name, kind) not in self._casts:
            cast = f"{name}.{'float32' if kind == 'float32' else 'half'}"
            self._casts[name, kind] = cast
            self._nodes.append(_cast(name, cast, kind))
        return self._casts[name, kind]

    def _take_weight(self, name: str, kind: str) -> str:
        weight = self._network.weights[name]
        if name not in self._floats or kind == "float32":
            self._weights[name] = weight
            return name
        half = f"{name}.half"
        if half not in self._weights:
            self._weights[half] = _narrowed(name, weight.array, self._kind)
        return half


def _narrowed(name: str, values: Any, kind: str) -> Weight:
    largest = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    if not np.isfinite(largest):  # of the others
        largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    if kind == "float16" and largest > _LARGEST:
        raise CheckpointError(
            f"{name}: expected weights up to {_LARGEST:.0f} for float16, got {largest:.3g}. Export "
            "with precisions=('float32',) or ('float32', 'bfloat16')."
        )
    return Weight(values, kind)


def _retyped(node: Node, kind: str) -> Mapping[str, Any]:
    """Attributes that name float32 or hold such values, for another kind."""
    attributes = dict(node.attributes)
    if attributes.get("to") == ONNX_TYPES["float32"]:
        attributes["to"] = ONNX_TYPES[kind]
    value = attributes.get("value")
    if kind != "float32" and isinstance(value, Weight) and value.dtype == "float32":
        attributes["value"] = _narrowed(node.name, value.array, kind)
    return attributes


def _cast(source: str, target: str, kind: str) -> Node:
    return Node(f"cast_{target}", "Cast", (source,), (target,), {"to": ONNX_TYPES[kind]})
