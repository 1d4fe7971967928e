"""Rewrite a graph into fewer and larger operations, for GPUs where each launch costs time.

Each pattern is one function. It takes a graph, changes what matches, leaves the rest as it is, and
returns how often it matched. What a rewritten graph computes differs by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zsseg_rt.backends._torch_graph.graph import Graph, Node
from zsseg_rt.backends._torch_graph.joins import (
    extend_linear,
    fuse_add_norm,
    fuse_relu,
    fuse_unit,
)
from zsseg_rt.backends._torch_graph.operators import OPERATORS, TORCH_DTYPES
from zsseg_rt.backends._torch_graph.starts import fuse_start, multiply_patches

_HALVES = (torch.float16, torch.bfloat16)
# torch's kernels compute in float32 inside
_WIDE_INSIDE = ("InstanceNormalization", "LayerNormalization", "Softmax")
# each result is one value, or a mean, which torch computes in float32 inside
_MEET_NO_OTHERS = ("Gather", "ReduceMean", "Reshape", "Slice", "Transpose")
_MOST_FOLDED = 1 << 22  # elements: a constant that large is not worth its memory


def rewrite(graph: Graph) -> dict[str, int]:
    """Apply every pattern; returns how often each matched, by name."""
    counts = {}
    for name, pattern in PATTERNS.items():
        counts[name] = pattern(graph)
        graph.drop_unused()
    return counts


def fold_constants(graph: Graph) -> int:
    """Compute what depends on constants alone, once."""
    count = 0
    for node in list(graph.nodes):
        held = [graph.constants.get(name) for name in node.inputs if name]
        if not held or any(value is None for value in held):
            continue
        if set(node.outputs) & set(graph.outputs) or node.op_type not in OPERATORS:
            continue
        given = [graph.constants.get(name) for name in node.inputs]
        try:
            result = OPERATORS[node.op_type](node.attributes, *given)
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue  # a run says what is wrong with it
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        if sum(value.numel() for value in results) > _MOST_FOLDED:
            continue
        values = [value.contiguous() for value in results]
        graph.constants.update(zip(node.outputs, values, strict=True))
        graph.replace([node], [], at=node)
        count += 1
    return count


def hoist_casts(graph: Graph) -> int:
    """What is only read in parts, or as a mean, that are then rounded is rounded before, once."""
    count = 0
    for node in reversed(list(graph.nodes)):
        name = node.outputs[0]
        parts = graph.users(name)
        casts = [graph.only_user(part.outputs[0]) for part in parts]
        given = [cast.attributes.get("to") if cast is not None else None for cast in casts]
        alike = len({*given}) == 1 and TORCH_DTYPES.get(given[0] or 0) in _HALVES
        if not alike or name in graph.outputs or graph.dtype(name) != torch.float32:
            continue
        if any(part.op_type not in _MEET_NO_OTHERS or part.inputs[0] != name for part in parts):
            continue
        rounded = f"{name}.rounded"
        half = Node(f"{node.name}.rounded", "Cast", (name,), (rounded,), {"to": given[0]})
        graph.replace([], [node, half], at=node)
        for part, cast in zip(parts, casts, strict=True):
            assert cast is not None
            kept = replace(part, inputs=(rounded, *part.inputs[1:]), outputs=cast.outputs)
            graph.replace([cast], [kept], at=part)
        count += 1
    return count


def drop_casts(graph: Graph) -> int:
    """Norms and softmax take and give half precision: torch's kernels widen it inside."""
    count = 0
    for node in list(graph.nodes):
        cast = graph.maker(node.inputs[0]) if node.op_type in _WIDE_INSIDE else None
        if cast is None or cast.op_type != "Cast" or node.outputs[0] in graph.outputs:
            continue
        half = graph.dtype(cast.inputs[0])
        after = graph.users(node.outputs[0])
        weights = [graph.constants.get(name) for name in node.inputs[1:] if name]
        if half not in _HALVES or any(weight is None for weight in weights):
            continue
        if not after or any(not _casts_to(user, half) for user in after):
            continue
        narrow = [_narrowed(graph, name, half) for name in node.inputs[1:]]
        inputs = (cast.inputs[0], *narrow)
        kept = replace(node, inputs=inputs, outputs=after[0].outputs)
        graph.replace(after, [kept], at=node)
        for other in after[1:]:
            _rename(graph, other.outputs[0], kept.outputs[0])
        count += 1
    return count


def fuse_attention(graph: Graph) -> int:
    """``[Mul,] MatMul, [Add,] Softmax, MatMul`` are one scaled dot product attention."""
    count = 0
    for softmax in [node for node in graph.nodes if node.op_type == "Softmax"]:
        found = _find_attention(graph, softmax)
        if found is None:
            continue
        last, parts = found
        keys = f"{last.outputs[0]}.keys"  # as rows; whoever transposed them made a view
        rows = Node(f"{last.name}.keys", "SwapLastAxes", (parts.keys,), (keys,), {})
        inputs = (parts.queries, keys, last.inputs[1], *parts.mask)
        scale = {"scale": parts.scale}
        fused = Node(last.name, "FusedAttention", inputs, last.outputs, scale)
        graph.replace([*parts.nodes, softmax], [rows, fused], at=last)
        count += 1
    return count


def fuse_linear(graph: Graph) -> int:
    """``MatMul`` by a matrix of weights and ``Add`` of a bias are one product."""
    count = 0
    for product in [node for node in graph.nodes if node.op_type == "MatMul"]:
        weight = graph.constants.get(product.inputs[1])
        add = graph.only_user(product.outputs[0])
        if weight is None or weight.ndim != 2 or add is None or add.op_type != "Add":
            continue
        name = next(name for name in add.inputs if name != product.outputs[0])
        bias = graph.constants.get(name)
        if bias is None or bias.shape != weight.shape[1:] or bias.dtype != weight.dtype:
            continue
        inputs = (*product.inputs, name)
        linear = Node(product.name, "Linear", inputs, add.outputs, {})
        graph.replace([product], [linear], at=add)
        count += 1
    return count


def fold_quick_gelu(graph: Graph) -> int:
    """``x * sigmoid(c x)`` between two products is ``silu``; c goes into their weights."""
    count = 0
    for sigmoid in [node for node in graph.nodes if node.op_type == "Sigmoid"]:
        found = _find_quick_gelu(graph, sigmoid)
        if found is None:
            continue
        before, scaling, gate, after, factor = found
        scaled = _scaled(graph, before, factor, inputs=(1, 2))
        divided = _scaled(graph, after, 1 / factor, inputs=(1,))
        silu = Node(sigmoid.name, "Silu", before.outputs, gate.outputs, {})
        graph.replace([scaling, sigmoid], [silu], at=gate)
        graph.replace([before], [scaled], at=before)
        graph.replace([after], [divided], at=after)
        count += 1
    return count


def merge_linear(graph: Graph) -> int:
    """Products of the same rows by several matrices are one product, cut into views."""
    count = 0
    groups: dict[tuple[str, torch.dtype | None], list[Node]] = {}
    for node in graph.nodes:
        if node.op_type == "Linear":
            key = (node.inputs[0], graph.dtype(node.inputs[1]))
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            graph.replace(nodes, _merged(graph, nodes), at=nodes[0])
            count += 1
    return count


PATTERNS: dict[str, Callable[[Graph], int]] = {
    "folded_constants": fold_constants,
    "patch_product": multiply_patches,
    "hoisted_casts": hoist_casts,
    "dropped_casts": drop_casts,
    "fused_attention": fuse_attention,
    "fused_linear": fuse_linear,
    "quick_gelu": fold_quick_gelu,
    "merged_linear": merge_linear,
    "extended_linear": extend_linear,
    "fused_relu": fuse_relu,
    "fused_unit": fuse_unit,
    "fused_start": fuse_start,
    "fused_add_norm": fuse_add_norm,
}
"""By the name under which a graph's report counts them, in the order they are applied."""


@dataclass
class _Scores:
    """What an attention's scores are made of, found from the softmax upwards."""

    queries: str
    keys: str
    mask: tuple[str, ...]
    scale: float
    nodes: list[Node]


def _find_attention(graph: Graph, softmax: Node) -> tuple[Node, _Scores] | None:
    last = graph.only_user(softmax.outputs[0])
    if softmax.attributes.get("axis", -1) != -1 or last is None:
        return None
    if last.op_type != "MatMul" or last.inputs[0] != softmax.outputs[0]:
        return None
    scores = graph.maker(softmax.inputs[0])
    mask: tuple[str, ...] = ()
    nodes: list[Node] = []
    if scores is not None and scores.op_type == "Add":
        added = _mask_of(graph, scores)
        if added is None:
            return None
        nodes.append(scores)
        product, mask = added
    else:
        product = scores
    if product is None or product.op_type != "MatMul":
        return None
    if any(graph.only_user(node.outputs[0]) is None for node in (*nodes, product)):
        return None
    nodes.append(product)
    queries, q_scale, q_nodes = _unscaled(graph, product.inputs[0])
    keys, k_scale, k_nodes = _unscaled(graph, product.inputs[1])
    nodes += q_nodes + k_nodes
    return last, _Scores(queries, keys, mask, q_scale * k_scale, nodes)


def _mask_of(graph: Graph, add: Node) -> tuple[Node | None, tuple[str, ...]] | None:
    """The product and the constant that an Add joins, if the constant fits as a mask."""
    for name, other in (add.inputs, add.inputs[::-1]):
        mask = graph.constants.get(name)
        if mask is not None and mask.ndim >= 2 and mask.numel() == mask.shape[-2:].numel():
            return graph.maker(other), (name,)
    return None


def _unscaled(graph: Graph, name: str) -> tuple[str, float, list[Node]]:
    """A value before it was multiplied by a constant number, and that number."""
    node = graph.maker(name)
    if node is None or node.op_type != "Mul" or graph.only_user(name) is None:
        return name, 1.0, []
    for given, other in (node.inputs, node.inputs[::-1]):
        factor = graph.scalar(given)
        if factor is not None and graph.constants[given].ndim <= 1 and other not in graph.constants:
            return other, factor, [node]
    return name, 1.0, []


def _find_quick_gelu(graph: Graph, sigmoid: Node) -> tuple[Node, Node, Node, Node, float] | None:
    """The product before, the scaling, the gate, the product after, and the factor."""
    scaling = graph.maker(sigmoid.inputs[0])
    gate = graph.only_user(sigmoid.outputs[0])
    if scaling is None or scaling.op_type != "Mul" or gate is None or gate.op_type != "Mul":
        return None
    x, factor, _ = _unscaled(graph, scaling.outputs[0])
    before, after = graph.maker(x), graph.only_user(gate.outputs[0])
    if before is None or before.op_type != "Linear" or x in graph.outputs or not factor > 0:
        return None
    if {*graph.users(x)} != {scaling, gate} or {*gate.inputs} != {x, sigmoid.outputs[0]}:
        return None
    if (
        after is None
        or after.inputs[0] != gate.outputs[0]
        or after.inputs[1] not in graph.constants
    ):
        return None
    return (before, scaling, gate, after, factor) if after.op_type in ("Linear", "MatMul") else None


def _scaled(graph: Graph, node: Node, factor: float, inputs: Iterable[int]) -> Node:
    """The node with some of its constants multiplied, rounded once."""
    names = list(node.inputs)
    for place in inputs:
        held = graph.constants[names[place]]
        value = (held.float() * factor).to(held.dtype)
        names[place] = graph.add_constant(f"{names[place]}.scaled", value)
    return replace(node, inputs=tuple(names))


def _merged(graph: Graph, nodes: list[Node]) -> list[Node]:
    weights = [graph.constants[node.inputs[1]] for node in nodes]
    biases = [graph.constants[node.inputs[2]] for node in nodes]
    first = nodes[0]
    weight = graph.add_constant(f"{first.inputs[1]}.merged", torch.cat(weights, dim=1))
    bias = graph.add_constant(f"{first.inputs[2]}.merged", torch.cat(biases))
    joined = f"{first.outputs[0]}.merged"
    sizes = {"axis": -1, "sizes": [held.shape[1] for held in weights]}
    outputs = tuple(node.outputs[0] for node in nodes)
    return [
        Node(first.name, "Linear", (first.inputs[0], weight, bias), (joined,), {}),
        Node(f"{first.name}.parts", "Parts", (joined,), outputs, sizes),
    ]


def _casts_to(node: Node, dtype: torch.dtype) -> bool:
    return node.op_type == "Cast" and TORCH_DTYPES.get(node.attributes["to"]) == dtype


def _narrowed(graph: Graph, name: str, dtype: torch.dtype) -> str:
    held: Any = graph.constants.get(name)
    if held is None or held.dtype == dtype:
        return name
    return graph.add_constant(f"{name}.narrow", held.to(dtype))


def _rename(graph: Graph, old: str, new: str) -> None:
    """Let all that read one value read another."""
    for node in graph.users(old):
        inputs = tuple(new if name == old else name for name in node.inputs)
        graph.replace([node], [replace(node, inputs=inputs)], at=node)
