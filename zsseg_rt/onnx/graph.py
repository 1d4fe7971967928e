"""Write a network as an ONNX graph; what follows from constants alone becomes a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsseg_rt.common.arrays import TensorSpec, is_half
from zsseg_rt.onnx import rules
from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.check import Flow
from zsseg_rt.onnx.network import Network, Node, Weight, renamed, weight_of
from zsseg_rt.onnx.operations import Inputs, Linear, Norm, Operations, Shape, Value

_SMALL = 4096  # bytes up to which equal constants are written once


@dataclass(frozen=True)
class Made:
    """A value that the graph will compute; a word in its shape is an open axis."""

    name: str
    shape: Shape
    dtype: str


class Graph(Operations):
    """A graph in the making: inputs first, then operations, then outputs."""

    def __init__(self) -> None:
        super().__init__()
        self._scope: list[str] = []
        self._name_counts: Counter[str] = Counter()
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._constants: dict[Any, str] = {}
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        self._flow = Flow(Network(inputs=(), outputs=(), nodes=(), weights={}))

    def input(self, name: str, shape: Shape, dtype: str = "float32") -> Value:
        """Add an input; a word in the shape is an axis that stays open."""
        self._inputs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(shape)))
        self._flow.add("graph inputs", name, rules.Value(dtype, tuple(shape), source=name))
        return Made(name, tuple(shape), dtype)

    def output(self, name: str, x: Value) -> None:
        """Give a computed value to whoever runs the graph, under a name of its own."""
        self._nodes = [renamed(node, {x.name: name}) for node in self._nodes]
        self._flow.add("graph outputs", name, self._flow.values.pop(x.name))
        self._outputs.append(TensorSpec(name=name, dtype=x.dtype, shape=x.shape))

    def network(self) -> Network:
        """All that was written."""
        return Network(
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs),
            nodes=tuple(self._nodes),
            weights=dict(self._weights),
        )

    @contextmanager
    def at(self, scope: str) -> Iterator[None]:
        """Call nodes inside ``SCOPE/Operator``; scopes in scopes are joined by dots."""
        self._scope.append(scope)
        try:
            yield
        finally:
            self._scope.pop()

    def fold_norm(self, norm: Norm, linears: Sequence[Linear]) -> tuple[Norm, list[Linear]]:
        """Put scale and shift into projections, unless float16 holds their weights, as CLIP's."""
        if norm.weight is None or all(is_half(linear.weight) for linear in linears):
            return norm, list(linears)
        folded = []
        for weight, bias in linears:
            shift = np.zeros(len(weight), np.float32) if norm.bias is None else weight @ norm.bias
            folded.append(Linear(weight * norm.weight, shift if bias is None else bias + shift))
        return Norm(None, None, norm.eps), folded

    def linear(self, x: Value, linear: Linear, scale: float = 1.0) -> Value:
        """``(x @ weight.T + bias) * scale``; the scale becomes part of the weights."""
        if scale != 1:
            bias = None if linear.bias is None else linear.bias * np.float32(scale)
            linear = Linear(linear.weight * np.float32(scale), bias)
        return super().linear(x, linear)

    def apply(
        self, kind: str, inputs: Inputs, shape: Shape | None = None, **attributes: Any
    ) -> Value:
        """Write one operator; without a computed input its result is a constant."""
        if not any(isinstance(value, Made) for value in inputs):
            return compute(kind, inputs, attributes)
        base = f"{'.'.join(self._scope)}/{kind}"
        self._name_counts[base] += 1
        name = base if self._name_counts[base] == 1 else f"{base}_{self._name_counts[base]}"
        names = tuple(self._name(value, f"{name}.{at}") for at, value in enumerate(inputs))
        outputs = (name, f"{name}.places") if kind == "TopK" else (name,)
        self._nodes.append(Node(name, kind, names, outputs, attributes))
        values = self._flow.follow(self._nodes[-1])
        if shape is not None:
            values[0].shape = shape
        pairs = zip(outputs, values, strict=True)
        results = tuple(Made(name, value.shape, value.dtype) for name, value in pairs)
        return results if kind == "TopK" else results[0]

    def _name(self, value: Value, new: str) -> str:
        """An operand's name, none for one that is left out; a new constant becomes a weight."""
        if value is None:
            return ""
        if isinstance(value, Made):
            return value.name
        array = np.asarray(value)
        # Constants are kept, so nothing else comes to lie where one does.
        key: Any = (array.ctypes.data, array.shape, array.strides, array.dtype)
        if array.nbytes <= _SMALL:
            key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = new
            self._weights[new] = weight_of(array)
            self._flow.add("weights", new, rules.constant(self._weights[new].dtype, array))
        return self._constants[key]
