"""Write a quantised graph: Q/DQ nodes around chosen layers, float16 elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from zsseg_rt.export.float16 import to_float16
from zsseg_rt.export.quantized.calibration import Range
from zsseg_rt.export.quantized.layers import Group, drop_unused, weight_axis, weights_of
from zsseg_rt.export.quantized.number_formats import NumberFormat


def quantised_graph(
    model: onnx.ModelProto,
    chosen: Mapping[Group, Range],
    kind: NumberFormat,
    half: Collection[str] = (),
) -> onnx.ModelProto:
    """Return a graph whose chosen layers multiply 8-bit numbers; all else is float16.

    Args:
        model: A float32 graph of :func:`~zsseg_rt.export.quantized.layers.read_plain`; unchanged.
        chosen: The groups to quantise, and how.
        kind: The format.
        half: Inputs and outputs that become float16; see :func:`zsseg_rt.export.float16`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    before: dict[int, list[onnx.NodeProto]] = {}
    writer = _Writer(copy, kind)
    for group, found in chosen.items():
        before.setdefault(group.nodes[0], []).extend(writer.round_values(group, found))
        for place in group.nodes:
            node = copy.graph.node[place]
            before.setdefault(place, []).extend(writer.round_weight(node))
            node.input[0] = f"{group.tensor}.rounded"
    _put_before(copy, before)
    return to_float16(copy, half=half)


def emulated_graph(
    model: onnx.ModelProto, chosen: Mapping[Group, Range], kind: NumberFormat
) -> onnx.ModelProto:
    """Return a float32 graph that computes with the numbers that E4M3 holds.

    Runtimes on CPUs store FP8 and do not compute with it as GPUs do (OpenVINO 2026.4 reads such
    graphs, and gives other numbers), so what FP8 loses is measured with this one.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    before: dict[int, list[onnx.NodeProto]] = {}
    weights = weights_of(model)
    for group, found in chosen.items():
        before.setdefault(group.nodes[0], []).extend(_rounding(copy, group, found, kind))
        for place in group.nodes:
            node, name = copy.graph.node[place], f"{copy.graph.node[place].output[0]}.weight"
            weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
            others = tuple(axis for axis in range(weight.ndim) if axis != weight_axis(node))
            scale = kind.scale(np.abs(weight).max(axis=others, keepdims=True))
            rounded = kind.rounded(weight, scale)
            copy.graph.initializer.append(numpy_helper.from_array(rounded, name))
            node.input[0], node.input[1] = f"{group.tensor}.rounded", name
    _put_before(copy, before)
    return copy


def _rounding(
    model: onnx.ModelProto, group: Group, found: Range, kind: NumberFormat
) -> Iterator[onnx.NodeProto]:
    """Nodes that round a tensor to E4M3: to a step of an eighth of its power of two."""
    name = group.tensor
    numbers = {
        "scale": found.scale, "low": -kind.largest, "high": kind.largest, "least": 2.0**-6,
        "per_bit": 1.0 / np.log(2.0), "bits": 3.0, "two": 2.0,
    }  # fmt: skip
    for key, number in numbers.items():
        tensor = numpy_helper.from_array(np.float32(number), f"{name}.{key}")
        model.graph.initializer.append(tensor)
    steps = (
        ("Div", "scaled", (name, "scale")), ("Clip", "kept", ("scaled", "low", "high")),
        ("Abs", "magnitude", ("kept",)), ("Max", "normal", ("magnitude", "least")),
        ("Log", "log", ("normal",)), ("Mul", "log2", ("log", "per_bit")),
        ("Floor", "power", ("log2",)), ("Sub", "last", ("power", "bits")),
        ("Pow", "step", ("two", "last")), ("Div", "steps", ("kept", "step")),
        ("Round", "whole", ("steps",)), ("Mul", "narrow", ("whole", "step")),
        ("Mul", "rounded", ("narrow", "scale")),
    )  # fmt: skip
    for op_type, output, inputs in steps:
        named = [one if one == name else f"{name}.{one}" for one in inputs]
        yield helper.make_node(op_type, named, [f"{name}.{output}"], name=f"{group.name}/{output}")


def _put_before(model: onnx.ModelProto, before: Mapping[int, list[onnx.NodeProto]]) -> None:
    """Insert nodes before the places of others, and drop weights that nothing reads now."""
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for place, node in enumerate(nodes):
        model.graph.node.extend([*before.get(place, ()), node])
    drop_unused(model)


class _Writer:
    """Adds weights to a graph, and makes the nodes that read them."""

    def __init__(self, model: onnx.ModelProto, kind: NumberFormat) -> None:
        self._added, self._kind = model.graph.initializer, kind
        self._weights = weights_of(model)

    def round_values(self, group: Group, found: Range) -> list[onnx.NodeProto]:
        """The pair of nodes behind a tensor."""
        name = group.tensor
        self._added.append(numpy_helper.from_array(np.float32(found.scale), f"{name}.scale"))
        self._added.append(self._kind.zeros(f"{name}.zero", []))
        constants = [f"{name}.scale", f"{name}.zero"]
        return [
            helper.make_node(
                "QuantizeLinear", [name, *constants], [f"{name}.narrow"], name=f"{group.name}/Q"
            ),
            helper.make_node(
                "DequantizeLinear", [f"{name}.narrow", *constants], [f"{name}.rounded"],
                name=f"{group.name}/DQ",
            ),
        ]  # fmt: skip

    def round_weight(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Give a layer a weight in 8 bits; layers may share one, so each gets its own."""
        axis = weight_axis(node)
        weight = numpy_helper.to_array(self._weights[node.input[1]]).astype(np.float32)
        others = tuple(other for other in range(weight.ndim) if other != axis)
        scale = self._kind.scale(np.abs(weight).max(axis=others))
        name = f"{node.output[0]}.weight"
        shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
        self._added.append(self._kind.tensor(name, weight, scale.reshape(shape)))
        self._added.append(numpy_helper.from_array(scale, f"{name}.scale"))
        self._added.append(self._kind.zeros(f"{name}.zero", [len(scale)]))
        inputs = [name, f"{name}.scale", f"{name}.zero"]
        node.input[1] = f"{name}.rounded"
        return [
            helper.make_node(
                "DequantizeLinear", inputs, [node.input[1]], name=f"{name}/DQ", axis=axis
            )
        ]
