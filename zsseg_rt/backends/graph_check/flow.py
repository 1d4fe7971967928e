"""Follow what is known of every tensor through a graph, node by node."""

from __future__ import annotations

from typing import Any

from zsseg_rt.backends.graph_check import rules, rules_network
from zsseg_rt.backends.graph_check.graph import Graph, Node, Stated, WeightTensor
from zsseg_rt.backends.graph_check.operators import CHOICES, allowed_attributes, has_type
from zsseg_rt.backends.graph_check.value import (
    Call,
    Shape,
    Value,
    check_attribute,
    check_shape,
    known_size,
)

RULES = rules.RULES | rules_network.RULES

_OPEN = 16  # what an axis that is open until a run counts as; few are longer


class Flow:
    """What is known of the tensors made so far.

    Attributes:
        values: By name.
        token_rows: Graph inputs whose integers choose rows of a table, and the rows there are.
    """

    def __init__(self, graph: Graph, opset: int) -> None:
        self._opset, self._stated = opset, graph.stated
        self.token_rows: dict[str, int] = {}
        self.values: dict[str, Value] = {
            tensor.name: Value(tensor.data_type, tensor.dims, tensor=tensor)
            for tensor in graph.weights
        }
        for spec in graph.inputs:
            stated = graph.stated[spec.name]
            if stated.shape is None:
                raise ValueError(f"graph input {spec.name!r}: expected a shape, got none")
            self.values[spec.name] = Value(stated.dtype, stated.shape, source=spec.name)

    def constant(self, name: str, tensor: WeightTensor) -> None:
        """Add what a Constant node holds."""
        self.values[name] = Value(tensor.data_type, tensor.dims, tensor=tensor)

    def follow(self, where: str, node: Node, attributes: dict[str, Any]) -> None:
        """Judge a node by what is known of its inputs, and add its outputs."""
        inputs = [self.values[name] if name else None for name in node.inputs]
        if any(value is not None and 0 in value.shape and _is_empty(value) for value in inputs):
            raise ValueError(f"{where}: expected inputs with elements, got one of none")
        call = Call(
            node.op_type, self._opset, inputs, attributes, len(node.outputs), self.token_rows
        )
        try:
            made = RULES[node.op_type](call)
        except ValueError as exc:
            raise ValueError(f"{where}: {exc}") from exc
        results = made if isinstance(made, list) else [made]
        for name, value in zip(node.outputs, results, strict=True):
            self._check(where, name, value)
            self.values[name] = value

    def _check(self, where: str, name: str, value: Value) -> None:
        shape = value.shape
        check_shape(where, [*known_size(shape), *[_OPEN] * shape.count(None)])
        if 0 in shape and len(shape) > 1:
            raise ValueError(f"{where}: expected a result, got none: its shape is {list(shape)}")
        stated = self._stated.get(name)
        if stated is not None and not _agree(stated, value.dtype, shape):
            raise ValueError(
                f"{where}: {name}: expected the type that it computes, {list(shape)} of data type "
                f"{value.dtype}, got {_told(stated.shape)} of {stated.dtype} stated"
            )


def _is_empty(value: Value) -> bool:
    """Whether a value of no elements is more than a list that says nothing, such as no scales."""
    return len(value.shape) > 1 or (value.tensor is None and value.known() is None)


def _agree(stated: Stated, dtype: int, shape: Shape) -> bool:
    if stated.dtype not in (0, dtype):
        return False
    if stated.shape is None or stated.shape == shape:
        return True
    return len(stated.shape) == len(shape) and all(
        a is None or b is None or a == b for a, b in zip(stated.shape, shape, strict=True)
    )


def _told(shape: Shape | None) -> object:
    return None if shape is None else list(shape)


def read_attributes(where: str, node: Node) -> dict[str, Any]:
    """A node's attributes by name."""
    allowed = allowed_attributes(node.op_type)
    found: dict[str, Any] = {}
    for attribute in node.attributes:
        name, value = attribute.name, attribute.value
        if name in found:
            names = [each.name for each in node.attributes]
            raise ValueError(f"{where}: expected each attribute once, got {', '.join(names)}")
        if value is None:
            raise ValueError(
                f"{where}: {name}: expected a number, text or tensor of its type, "
                "got a subgraph or another type"
            )
        if name not in allowed or not has_type(name, value):
            raise ValueError(
                f"{where}: expected attributes of {node.op_type} ({', '.join(sorted(allowed))}), "
                f"each of its type, got {name!r}"
            )
        choices = CHOICES.get(name) or CHOICES.get(f"{name} {node.op_type}")
        if choices and name != "equation" and bytes(value) not in map(str.encode, choices):
            raise ValueError(
                f"{where}: {name}: expected one of {', '.join(choices)}, got {bytes(value)!r}"
            )
        check_attribute(f"{where}: {name}", name, value)
        found[name] = value
    return found
