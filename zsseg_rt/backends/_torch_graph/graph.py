"""A decoded ONNX graph that can be searched and changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One operator with its attributes, decoded. An input named ``""`` was left out."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class Graph:
    """Nodes in an order in which they can run, and the constants they read."""

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: dict[str, Tensor],
        outputs: tuple[str, ...],
        input_dtypes: dict[str, torch.dtype],
    ) -> None:
        self.nodes = list(nodes)
        self.constants, self.outputs, self.input_dtypes = constants, outputs, input_dtypes
        self._index()

    def maker(self, name: str) -> Node | None:
        """The node that computes a value; None for inputs and constants."""
        return self._makers.get(name)

    def users(self, name: str) -> list[Node]:
        """The nodes that read a value, in order."""
        return self._users.get(name, [])

    def only_user(self, name: str) -> Node | None:
        """The node that reads a value, if nothing else does and it is no result."""
        users = self.users(name)
        alone = len(users) == 1 and users[0].inputs.count(name) == 1 and name not in self.outputs
        return users[0] if alone else None

    def scalar(self, name: str) -> float | None:
        """The value of a constant with one element."""
        held = self.constants.get(name)
        return float(held) if held is not None and held.numel() == 1 else None

    def dtype(self, name: str) -> torch.dtype | None:
        """The type of a value as the graph declares it; None where that is not known."""
        if name in self.constants:
            return self.constants[name].dtype
        return self._dtypes.get(name)

    def add_constant(self, name: str, value: Tensor) -> str:
        """Hold one more constant; returns the name that it got."""
        while name in self.constants or name in self._dtypes or name in self._makers:
            name += "."
        self.constants[name] = value
        return name

    def replace(self, old: Iterable[Node], new: Sequence[Node], *, at: Node) -> None:
        """Put nodes in the place of one node, and drop others."""
        dropped = {id(node) for node in old} - {id(at)}
        kept = [node for node in self.nodes if id(node) not in dropped]
        place = next(index for index, node in enumerate(kept) if node is at)
        self.nodes = [*kept[:place], *new, *kept[place + 1 :]]
        self._index()

    def drop_unused(self) -> None:
        """Drop nodes and constants that no result depends on."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {n: held for n, held in self.constants.items() if n in needed}
        self._index()

    def last_uses(self) -> list[tuple[str, ...]]:
        """By node, the values that no later one reads; they can be freed after it."""
        kept = set(self.outputs) | set(self.constants) | {""}
        final = {name: place for place, node in enumerate(self.nodes) for name in node.inputs}
        uses: dict[int, list[str]] = defaultdict(list)
        for name, place in final.items():
            if name not in kept:
                uses[place].append(name)
        return [tuple(uses[place]) for place in range(len(self.nodes))]

    def _index(self) -> None:
        self._makers = {name: node for node in self.nodes for name in node.outputs}
        self._users: dict[str, list[Node]] = defaultdict(list)
        self._dtypes: dict[str, torch.dtype] = dict(self.input_dtypes)
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                self._users[name].append(node)
            held = self._dtype_of_results(node)
            if held is not None:
                self._dtypes.update(dict.fromkeys(node.outputs, held))

    def _dtype_of_results(self, node: Node) -> torch.dtype | None:
        """Of the operators that are supported, only three change a type."""
        import torch

        from zsseg_rt.backends._torch_graph.operators import TORCH_DTYPES

        if node.op_type == "Cast":
            return TORCH_DTYPES.get(node.attributes["to"])
        if node.op_type in ("Shape", "ArgMax"):
            return torch.int64
        if node.op_type == "Equal":
            return torch.bool
        return self.dtype(node.inputs[0]) if node.inputs else None
