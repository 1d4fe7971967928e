"""Patterns that save launches before a transformer's first block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.backends._torch_graph.graph import Graph, Node
from zsseg_rt.backends._torch_graph.joins import is_norm, norm_width, stacked_weights


def multiply_patches(graph: Graph) -> int:
    """A convolution by steps of its own size, read as rows, is one product of all patches.

    cuDNN would take several launches, as it turns channels first into channels last and back.
    """
    count = 0
    for conv in [node for node in graph.nodes if node.op_type == "Conv"]:
        reshape = graph.only_user(conv.outputs[0])
        turned = None if reshape is None else graph.only_user(reshape.outputs[0])
        weight = graph.constants.get(conv.inputs[1])
        if reshape is None or turned is None or weight is None or not _is_patchwise(conv, weight):
            continue
        if reshape.op_type != "Reshape" or turned.op_type != "Transpose":
            continue
        shape = graph.constants.get(reshape.inputs[1])
        if shape is None or len(shape) != 3 or turned.attributes.get("perm") != [0, 2, 1]:
            continue
        if int(shape[1]) not in (0, len(weight)):
            continue
        cut = Node(conv.name, "Patches", conv.inputs[:1], conv.outputs, {"hw": weight.shape[2:]})
        matrix = graph.add_constant(f"{conv.inputs[1]}.matrix", weight.flatten(1).T.contiguous())
        kind = "Linear" if conv.inputs[2:] else "MatMul"
        inputs = (conv.outputs[0], matrix, *conv.inputs[2:])
        product = Node(f"{conv.name}.product", kind, inputs, turned.outputs, {})
        graph.replace([conv, reshape], [cut, product], at=turned)
        count += 1
    return count


def _is_patchwise(conv: Node, weight: Tensor) -> bool:
    given = conv.attributes
    ones = {*given.get("dilations", [1]), given.get("group", 1)} == {1}
    return (
        ones
        and list(weight.shape[2:]) == given.get("strides")
        and not any(given.get("pads", []))
        and given.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def fuse_start(graph: Graph) -> int:
    """Positions added, perhaps a norm, constant rows such as the class token's, and a norm.

    One launch of :mod:`zsseg_rt.ops` writes between the constant rows, which stay.
    """
    count = 0
    for add in [node for node in graph.nodes if node.op_type == "Add"]:
        found = _find_start(graph, add)
        if found is not None:
            _join_start(graph, add, found)
            count += 1
    return count


class _Start(NamedTuple):
    """From rows of patches to the first block."""

    patches: str
    positions: str
    before: list[Tensor]  # [1, C, D] each
    after: list[Tensor]
    norms: list[Node]  # before the constant rows, if any, and behind
    joints: list[Node]


def _find_start(graph: Graph, add: Node) -> _Start | None:
    patches, positions = sorted(add.inputs, key=lambda name: name in graph.constants)
    norm = graph.only_user(add.outputs[0])
    if positions not in graph.constants or norm is None:
        return None
    norms = [norm] if is_norm(graph, norm) else []
    before: list[Tensor] = []
    after: list[Tensor] = []
    name, joints = norm.outputs[0] if norms else add.outputs[0], []
    while True:
        joint = graph.only_user(name)
        if joint is None or joint.op_type != "Concat" or joint.attributes["axis"] != 1:
            break
        place = joint.inputs.index(name)
        held = [graph.constants.get(other) for other in joint.inputs]
        rows = [each for each in held if each is not None]
        if len(rows) != len(held) - 1 or any(each.shape[0] != 1 for each in rows):
            return None
        before, after = rows[:place] + before, after + rows[place:]
        joints.append(joint)
        name = joint.outputs[0]
    second = next((user for user in graph.users(name) if is_norm(graph, user)), None)
    if not joints or second is None or name in graph.outputs:
        return None
    norms.append(second)
    if len({norm_width(graph, norm) for norm in norms}) > 1:
        return None
    return _Start(patches, positions, before, after, norms, joints)


def _join_start(graph: Graph, add: Node, start: _Start) -> None:
    norms, tokens = start.norms, start.joints[-1].outputs[0]
    scale, shift = stacked_weights(graph, norms)
    eps = [norm.attributes.get("epsilon", 1e-5) for norm in norms]
    rows = torch.cat([*start.before, *start.after], dim=1)[0]
    normed = F.layer_norm(rows.float(), rows.shape[1:], scale[-1], shift[-1], eps[-1])
    around = torch.stack([rows, normed.to(rows.dtype)])
    inputs = [start.patches, start.positions]
    constants = {"scale": scale, "shift": shift, "around": around}
    inputs += [graph.add_constant(f"{tokens}.{kind}", held) for kind, held in constants.items()]
    settings = {"eps": eps, "before": sum(each.shape[1] for each in start.before)}
    outputs = (norms[-1].outputs[0], tokens)
    fused = Node(norms[0].name, "StartRows", tuple(inputs), outputs, settings)
    graph.replace([add, *norms, *start.joints], [fused], at=start.joints[-1])
