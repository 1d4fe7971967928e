"""Read ONNX graphs as networks, and turn them into float16 as networks are."""

from __future__ import annotations

from collections.abc import Collection
from io import BytesIO

import onnx
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.network import Network, Node, weight_of
from zsseg_rt.onnx.writer import write_onnx


def to_float16(model: onnx.ModelProto, *, half: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float16 version of a float32 graph; see :mod:`zsseg_rt.onnx.half`.

    Shapes:
        half: Names of inputs and outputs that become float16, where the graph has them and they are
            float32; the others stay as they are.

    Returns:
        A new model; ``model`` is not changed.
    """
    stream = BytesIO()
    write_onnx(to_half(network_of(model), half=half), model.graph.name, stream)
    made = onnx.load_model_from_string(stream.getvalue())
    onnx.checker.check_model(made)
    return made


def network_of(model: onnx.ModelProto) -> Network:
    """Read a graph; its types are inferred. ``model`` is not changed."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    weights = {
        tensor.name: weight_of(numpy_helper.to_array(tensor)) for tensor in graph.initializer
    }
    values = (*graph.input, *graph.output, *graph.value_info)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return Network(
        inputs=tuple(map(_spec, graph.input)),
        outputs=tuple(map(_spec, graph.output)),
        nodes=tuple(map(_node, graph.node)),
        weights=weights,
        opset=next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx")),
        floats=frozenset(floats | {n for n, w in weights.items() if w.dtype == "float32"}),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _node(node: onnx.NodeProto) -> Node:
    made = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    for name, value in made.items():
        if isinstance(value, TensorProto):
            made[name] = numpy_helper.to_array(value)
    return Node(node.name, node.op_type, tuple(node.input), tuple(node.output), made)
