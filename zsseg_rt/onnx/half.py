"""Turn a float32 network into one in half precision that keeps what overflows in float32.

That is norms, softmax and what is written in a scope ``float32``, between explicit casts; and what
becomes a size: the factors of Resize, the bounds of Range.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zsseg_rt.errors import CheckpointError
from zsseg_rt.onnx.check import Flow
from zsseg_rt.onnx.network import Network, Node, Weight
from zsseg_rt.onnx.operations import ONNX_TYPES
from zsseg_rt.onnx.table import OPERATORS

# Squares and exponentials: x * x overflows float16 from |x| = 256 on.
_WIDE = {"LayerNormalization", "InstanceNormalization", "Softmax"}
_WIDE |= {"ReduceL2", "ReduceSum", "ReduceMean", "Sqrt", "Range"}
_SIZED = {"Resize", "Range"}  # 24 times 4/3 of float16 is 31
_MOVES = {"Slice", "Gather", "Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Identity"}
_WIDE_IN = {
    "float16": _WIDE,
    "bfloat16": _WIDE | {"ConvTranspose"},
}  # TensorRT has none in bfloat16
_LARGEST = float(np.finfo(np.float16).max)


def to_half(network: Network, kind: str = "float16", *, half: Collection[str] = ()) -> Network:
    """The same network in ``kind``, float16 or bfloat16; inputs and outputs in ``half`` as well."""
    values = Flow(network).run().values
    floats = {name for name, value in values.items() if value.dtype == "float32"}
    narrow = set(half) & floats
    converter = _Converter(network, kind, narrow, floats)
    for node in network.nodes:
        converter.add(node)
    inputs, outputs = (
        tuple(replace(spec, dtype=kind) if spec.name in narrow else spec for spec in specs)
        for specs in (network.inputs, network.outputs)
    )
    return replace(
        network,
        inputs=inputs,
        outputs=outputs,
        nodes=tuple(converter.nodes),
        weights=converter.weights,
    )


class _Converter:
    def __init__(self, network: Network, kind: str, half: set[str], floats: set[str]) -> None:
        self._network, self._kind, self._half = network, kind, half
        self._floats, self._outputs = floats, {spec.name for spec in network.outputs}
        self.in_float32 = ({spec.name for spec in network.inputs} & self._floats) - half
        self.nodes: list[Node] = []
        self.weights: dict[str, Weight] = {}
        self._casts: dict[tuple[str, str], str] = {}
        self._sizing = {name for node in network.nodes for name in _sizing(node)}

    def add(self, node: Node) -> None:
        """Add a node in its precision, with the casts around it."""
        wide = self._stays_float32(node)
        kind = "float32" if wide else self._kind
        sizing = _sizing(node)
        kinds = [kind] * (len(node.inputs) - len(sizing)) + ["float32"] * len(sizing)
        inputs = tuple(map(self._take, node.inputs, kinds))
        names, casts = list(node.outputs), []
        for index, name in enumerate(node.outputs):
            is_narrow = name in self._half
            if name not in self._floats:
                continue
            if name in self._outputs and wide == is_narrow:  # both types stay available inside
                names[index] = self._casts[name, kind] = f"{name}.{kind}"
                casts.append(_cast(names[index], name, self._kind if is_narrow else "float32"))
                wide_inside = not is_narrow
            else:
                wide_inside = wide
            if wide_inside:
                self.in_float32.add(name)
        node = Node(node.name, node.kind, inputs, tuple(names), _retyped(node, kind))
        self.nodes += [node, *casts]

    def _stays_float32(self, node: Node) -> bool:
        if node.kind in _WIDE_IN[self._kind] or "float32" in node.name.partition("/")[0].split("."):
            return True
        if node.kind == "Constant":
            return node.outputs[0] in self._sizing
        data = [name for name in node.inputs if name in self._floats]
        computed = [name for name in data if name not in self._network.weights]
        if node.kind == "Div":  # the division by a norm
            return any(name in self.in_float32 for name in computed)
        leaves_as_half = all(name in self._half for name in node.outputs)
        moves = node.kind in _MOVES and bool(computed) and not leaves_as_half
        return moves and set(computed) <= self.in_float32

    def _take(self, name: str, kind: str) -> str:
        """The name under which a value is available as ``kind``; casts it at most once."""
        weight = self._network.weights.get(name)
        if weight is not None and (name not in self._floats or kind == "float32"):
            self.weights[name] = weight
        elif weight is not None:
            half = f"{name}.half"
            if half not in self.weights:
                self.weights[half] = _narrowed(name, weight.array, self._kind)
            return half
        elif name in self._floats and (name in self.in_float32) != (kind == "float32"):
            if (name, kind) not in self._casts:
                self._casts[name, kind] = f"{name}.{'float32' if kind == 'float32' else 'half'}"
                self.nodes.append(_cast(name, self._casts[name, kind], kind))
            return self._casts[name, kind]
        return name


def _sizing(node: Node) -> tuple[str, ...]:
    """Its inputs that sizes follow from, which are constants."""
    return node.inputs[OPERATORS[node.kind].host :] if node.kind in _SIZED else ()


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
