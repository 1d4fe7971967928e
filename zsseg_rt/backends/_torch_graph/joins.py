"""Patterns that save the launches around products: concatenations, activations, casts of norms."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zsseg_rt.backends._torch_graph.graph import Graph, Node
from zsseg_rt.backends._torch_graph.operators import TORCH_DTYPES

_HALVES = (torch.float16, torch.bfloat16)


def extend_linear(graph: Graph) -> int:
    """Constant rows behind a product's, such as prompts', are written once and not in each run.

    ``Linear, Parts``; then, for some parts, ``Reshape, Transpose`` to heads and a ``Concat``.
    """
    count = 0
    for cut in [node for node in graph.nodes if node.op_type == "Parts"]:
        product = graph.maker(cut.inputs[0])
        joints = {name: _find_joint(graph, name) for name in cut.outputs}
        held = [joint.rows for joint in joints.values() if joint is not None]
        if len({len(rows) for rows in held}) != 1 or product is None:
            continue
        alike = all(rows.dtype == graph.dtype(product.inputs[1]) for rows in held)
        if product.op_type != "Linear" or graph.only_user(product.outputs[0]) is not cut:
            continue
        if alike:
            _extend(graph, product, cut, joints, len(held[0]))
            count += 1
    return count


class _Joint(NamedTuple):
    """Where constants are put behind a part of a product."""

    reshape: Node
    transpose: Node
    concat: Node
    heads: int
    rows: Tensor  # [P, width of the part]


def _find_joint(graph: Graph, part: str) -> _Joint | None:
    reshape = graph.only_user(part)
    transpose = None if reshape is None else graph.only_user(reshape.outputs[0])
    concat = None if transpose is None else graph.only_user(transpose.outputs[0])
    if reshape is None or transpose is None or concat is None:
        return None
    kinds = (reshape.op_type, transpose.op_type, concat.op_type)
    if kinds != ("Reshape", "Transpose", "Concat") or len(concat.inputs) != 2:
        return None
    rows = graph.constants.get(concat.inputs[1])
    to_heads = transpose.attributes.get("perm") == [0, 2, 1, 3]
    if not to_heads or concat.attributes["axis"] != 2 or rows is None or rows.shape[0] != 1:
        return None
    _, heads, num_rows, _ = rows.shape
    return _Joint(reshape, transpose, concat, heads, rows[0].transpose(0, 1).reshape(num_rows, -1))


def _extend(
    graph: Graph, product: Node, cut: Node, joints: dict[str, _Joint | None], num_rows: int
) -> None:
    below, names, kept = [], [], []
    for (name, joint), size in zip(joints.items(), cut.attributes["sizes"], strict=True):
        if joint is not None:
            below.append(joint.rows)
            names.append(name)
            sizes = torch.tensor([1, -1, joint.heads, size // joint.heads])
            shape = graph.add_constant(f"{joint.reshape.name}.shape", sizes)
            reshape = replace(joint.reshape, inputs=(name, shape))
            graph.replace([joint.reshape], [reshape], at=joint.reshape)
            turned = replace(joint.transpose, outputs=joint.concat.outputs)
            graph.replace([joint.concat], [turned], at=joint.transpose)
            continue
        weight = graph.constants[product.inputs[1]]
        below.append(torch.zeros(num_rows, size, dtype=weight.dtype))
        names.append(f"{name}.extended")
        drop = Node(name, "DropRows", (names[-1],), (name,), {"rows": num_rows})
        kept.append(drop)
    rows = graph.add_constant(f"{product.outputs[0]}.below", torch.cat(below, dim=1))
    extended = replace(product, op_type="ExtendedLinear", inputs=(*product.inputs, rows))
    graph.replace([product], [extended], at=product)
    graph.replace([cut], [replace(cut, outputs=tuple(names)), *kept], at=cut)


def fuse_relu(graph: Graph) -> int:
    """A ``Relu`` of a product is part of its launch."""
    count = 0
    for product in [node for node in graph.nodes if node.op_type == "Linear"]:
        relu = graph.only_user(product.outputs[0])
        if relu is not None and relu.op_type == "Relu":
            fused = replace(product, op_type="LinearRelu", outputs=relu.outputs)
            graph.replace([relu], [fused], at=product)
            count += 1
    return count


def fuse_unit(graph: Graph) -> int:
    """``Cast, ReduceL2, Div, Cast`` of half precision: torch widens and narrows inside."""
    count = 0
    for divide in [node for node in graph.nodes if node.op_type == "Div"]:
        norm = graph.maker(divide.inputs[1])
        wide = graph.maker(divide.inputs[0])
        narrow = graph.only_user(divide.outputs[0])
        if norm is None or wide is None or narrow is None or norm.op_type != "ReduceL2":
            continue
        if wide.op_type != "Cast" or norm.inputs[0] != wide.outputs[0]:
            continue
        half = graph.dtype(wide.inputs[0])
        if half not in _HALVES or graph.only_user(norm.outputs[0]) is not divide:
            continue
        alone = {*graph.users(wide.outputs[0])} == {norm, divide}
        narrows = narrow.op_type == "Cast" and TORCH_DTYPES.get(narrow.attributes["to"]) == half
        if alone and narrows and wide.outputs[0] not in graph.outputs:
            inputs = (wide.inputs[0], *norm.inputs[1:])
            unit = Node(divide.name, "Unit", inputs, narrow.outputs, norm.attributes)
            graph.replace([wide, norm, narrow], [unit], at=divide)
            count += 1
    return count
