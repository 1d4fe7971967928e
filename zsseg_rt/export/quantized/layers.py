"""Which layers of a float32 graph can be quantised, grouped by the tensor that they read."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper, version_converter

from zsseg_rt.errors import ArgumentError

FloatArray = npt.NDArray[np.float32]
_COLOURS = 3
_OLDEST, _OPSET = 19, 20  # before 19, QuantizeLinear takes neither float16 nor gives E4M3


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that read one tensor and so share its range; they are quantised together.

    Attributes:
        name: The name of the first layer; it stands for all of them.
        tensor: What they read.
        nodes: The layers' places among the graph's nodes.
        convolves: Whether they are convolutions.
    """

    name: str
    tensor: str
    nodes: tuple[int, ...]
    convolves: bool


def read_plain(path: Any) -> onnx.ModelProto:
    """Read a graph; weights that are stored in float16 and cast become float32 weights.

    Raises:
        ArgumentError: The graph is quantised already, or of an operator set that is too old and
            cannot be converted.
    """
    model = _converted(onnx.load(path), path.name)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise ArgumentError(
            f"bundle: expected a graph in float32, got {path.name}, which is quantised already. "
            "Export the bundle again with --precision float32."
        )
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if source is None or source.data_type != TensorProto.FLOAT16:
            kept.append(node)
            continue
        wide = numpy_helper.to_array(source).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model)
    return model


def _converted(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same graph in an operator set whose Q/DQ nodes take float16 and E4M3."""
    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if found >= _OLDEST:
        return model
    try:
        return version_converter.convert_version(model, _OPSET)
    except (RuntimeError, version_converter.ConvertError) as exc:
        raise ArgumentError(
            f"bundle: expected graphs of operator set {_OLDEST} or newer, got {found} in {name}, "
            f"which cannot be converted: {str(exc).splitlines()[0]} Export it at opset {_OPSET}."
        ) from exc


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove weights that no node reads."""
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def weights_of(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """The graph's weights by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def find_groups(model: onnx.ModelProto) -> tuple[Group, ...]:
    """Find the linear layers and convolutions with constant weights.

    Left out are convolutions of an image with three channels (the patches), products of two
    computed tensors (attention, similarity), and Gemm with factors.
    """
    weights, readers = weights_of(model), defaultdict[str, list[int]](list)
    for place, node in enumerate(model.graph.node):
        if _can_quantise(node, weights):
            readers[node.input[0]].append(place)
    names = Counter(node.name for node in model.graph.node)
    groups = []
    for tensor, places in readers.items():
        nodes = [model.graph.node[place] for place in places]
        groups.append(
            Group(
                name=nodes[0].name.removesuffix("/MatMul")
                if nodes[0].name and names[nodes[0].name] == 1
                else nodes[0].output[0],
                tensor=tensor,
                nodes=tuple(places),
                convolves=any(node.op_type == "Conv" for node in nodes),
            )
        )
    return tuple(groups)


def weight_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weight that counts its outputs."""
    if node.op_type == "MatMul":
        return 1
    return 0 if node.op_type == "Conv" or _attribute(node, "transB", 0) else 1


def weight_matrix(node: onnx.NodeProto, weights: dict[str, TensorProto]) -> FloatArray:
    """A linear layer's weight as float32 [inputs, outputs]."""
    weight = np.asarray(numpy_helper.to_array(weights[node.input[1]]), np.float32)
    return weight if weight_axis(node) == 1 else weight.T


def _can_quantise(node: onnx.NodeProto, weights: dict[str, TensorProto]) -> bool:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[0] in weights:
        return False
    weight = weights.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT:
        return False
    if node.op_type == "Conv":
        return len(weight.dims) == 4 and weight.dims[1] * _attribute(node, "group", 1) != _COLOURS
    plain = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return len(weight.dims) == 2 and plain and not _attribute(node, "transA", 0)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
