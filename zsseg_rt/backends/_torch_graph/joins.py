"""Patterns that save the launches around products: concatenations, activations, sums, norms."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from zsseg_rt.backends._torch_graph.graph import Graph, Node
from zsseg_rt.backends._torch_graph.operators import TORCH_DTYPES

MOST_WIDTH = 2048  # of rows; see ops.add_layer_norm
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
    """``[Cast,] ReduceL2, Div[, Cast]`` of rows are one launch; torch widens half inside."""
    count = 0
    for divide in [node for node in graph.nodes if node.op_type == "Div"]:
        norm = graph.maker(divide.inputs[1])
        if norm is None or norm.op_type != "ReduceL2" or norm.inputs[0] != divide.inputs[0]:
            continue
        axes = graph.constants.get(norm.inputs[1]) if norm.inputs[1:] else None
        dims = norm.attributes.get("axes") if axes is None else axes.tolist()
        keeps = norm.attributes.get("keepdims", 1) == 1
        if dims != [-1] or not keeps or graph.only_user(norm.outputs[0]) is not divide:
            continue
        name, wide, narrow = divide.inputs[0], graph.maker(divide.inputs[0]), None
        dropped, outputs = [norm], divide.outputs
        if wide is not None and wide.op_type == "Cast" and graph.dtype(wide.inputs[0]) in _HALVES:
            half, narrow = graph.dtype(wide.inputs[0]), graph.only_user(divide.outputs[0])
            alone = {*graph.users(name)} == {norm, divide} and name not in graph.outputs
            if not alone or narrow is None or narrow.op_type != "Cast":
                continue
            if TORCH_DTYPES.get(narrow.attributes["to"]) != half:
                continue
            name, outputs, dropped = wide.inputs[0], narrow.outputs, [wide, norm, narrow]
        one = torch.ones(1, dtype=graph.dtype(name))
        inputs = (name, graph.add_constant(f"{outputs[0]}.one", one))
        graph.replace(dropped, [Node(divide.name, "Unit", inputs, outputs, {})], at=divide)
        count += 1
    return count


def fuse_add_norm(graph: Graph) -> int:
    """A sum and the norm of its rows, or two norms, are one launch of :mod:`zsseg_rt.ops`."""
    count = 0
    for add in [node for node in graph.nodes if node.op_type == "Add"]:
        read = [] if set(add.inputs) & set(graph.constants) else graph.users(add.outputs[0])
        for reader in read:
            cut = reader if _drops_last_rows(graph, reader) else None
            first = reader if cut is None else graph.only_user(cut.outputs[0])
            found = None if first is None else _find_norms(graph, add, first)
            if found is not None:
                _join_norms(graph, add, *found, cut)
                count += 1
                break
    return count


def _drops_last_rows(graph: Graph, node: Node) -> bool:
    """Whether some rows at the end are not read: to normalise them too costs less than a launch."""
    if node.op_type != "Slice" or node.outputs[0] in graph.outputs:
        return False
    start, end, axis, step = (graph.scalar(name) for name in (*node.inputs[1:], "", "")[:4])
    return (start, axis, step) == (0, 1, 1) and end is not None and end < 0


def _find_norms(graph: Graph, add: Node, reader: Node) -> tuple[list[Node], list[Node]] | None:
    """The norms of a sum's rows, one after another, and all nodes from its reader to the last."""
    half, nodes = graph.dtype(add.outputs[0]), [reader]
    norms = nodes[:]
    is_wide = reader.op_type == "Cast" and half in _HALVES
    if is_wide:
        norm = graph.only_user(reader.outputs[0])
        norms = [] if norm is None else [norm]
        nodes += norms
    if not all(is_norm(graph, norm) for norm in norms) or not norms:
        return None
    second = graph.only_user(norms[0].outputs[0])
    if (
        second is not None
        and is_norm(graph, second)
        and norm_width(graph, second) == norm_width(graph, norms[0])
    ):
        norms.append(second)
        nodes.append(second)
    if is_wide:
        narrow = graph.only_user(nodes[-1].outputs[0])
        if narrow is None or narrow.op_type != "Cast":
            return None
        if TORCH_DTYPES.get(narrow.attributes["to"]) != half:
            return None
        nodes.append(narrow)
    return norms, nodes


def is_norm(graph: Graph, node: Node) -> bool:
    """Whether a node is a norm of rows by constants, of a width that is fused."""
    weights = [graph.constants.get(name) for name in node.inputs[1:] if name]
    if node.op_type != "LayerNormalization" or node.attributes.get("axis", -1) != -1:
        return False
    return all(held is not None and held.ndim == 1 for held in weights) and (
        norm_width(graph, node) <= MOST_WIDTH
    )


def norm_width(graph: Graph, norm: Node) -> int:
    """Of the rows that a norm takes."""
    return len(graph.constants[norm.inputs[1]])


def stacked_weights(graph: Graph, norms: list[Node]) -> tuple[Tensor, Tensor]:
    """Scales and shifts of norms, float32 [L, D] each."""
    scale = torch.stack([graph.constants[norm.inputs[1]].float() for norm in norms])
    shift = [
        graph.constants[norm.inputs[2]].float() if norm.inputs[2:] else torch.zeros_like(held)
        for norm, held in zip(norms, scale, strict=True)
    ]
    return scale, torch.stack(shift)


def _join_norms(
    graph: Graph, add: Node, norms: list[Node], nodes: list[Node], cut: Node | None
) -> None:
    name = add.outputs[0]
    scale, shift = stacked_weights(graph, norms)
    weights = (
        graph.add_constant(f"{name}.scale", scale),
        graph.add_constant(f"{name}.shift", shift),
    )
    read = name in graph.outputs or len(graph.users(name)) > 1
    normed, behind = nodes[-1].outputs, []
    if cut is not None:
        whole = f"{normed[0]}.whole"
        behind = [replace(cut, inputs=(whole, *cut.inputs[1:]), outputs=normed)]
        normed = (whole,)
        nodes = [cut, *nodes]
    outputs = (*normed, *([name] if read else []))
    eps = [norm.attributes.get("epsilon", 1e-5) for norm in norms]
    settings = {"eps": eps, "with_total": read}
    fused = Node(norms[0].name, "AddNorm", (*add.inputs, *weights), outputs, settings)
    graph.replace(nodes, [fused, *behind], at=add)
