"""Small ONNX graphs for tests of backends, written with the onnx package."""

from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.writer import write_onnx


def to_float16(model, half=()):
    """The float16 version of a float32 graph, checked; inputs and outputs in ``half`` too."""
    stream = BytesIO()
    network = read_network(model.SerializeToString())
    write_onnx(to_half(network, half=half), "test", stream)
    half_model = onnx.load_model_from_string(stream.getvalue())
    onnx.checker.check_model(half_model)
    return half_model


def node(kind, inputs, outputs, name=None, **attributes):
    """A node of values whose names are separated by spaces."""
    return helper.make_node(kind, inputs.split(), outputs.split(), name, **attributes)


def make_graph(nodes, inputs, outputs, weights, opset=20):
    """A graph; ``inputs`` and ``outputs`` map names to (dtype code, shape)."""
    ends = [
        [helper.make_tensor_value_info(name, *kind) for name, kind in values.items()]
        for values in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("org.example", 1)]
    graph = helper.make_graph(nodes, "test", *ends, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write_graph(path: Path, nodes, inputs, outputs, weights=None) -> Path:
    """Write a graph that is sound."""
    model = make_graph(nodes, inputs, outputs, weights or {})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


FLOAT = TensorProto.FLOAT


def write_two_inputs(path: Path) -> Path:
    """``a`` [1, classes, 4], ``b`` [1, 3, 4] to ``scores`` [1, classes, 3] and ``doubled``."""
    return write_graph(
        path,
        [
            node("Transpose", "b", "bt", perm=[0, 2, 1]),
            node("MatMul", "a bt", "scores"),
            node("Add", "b b", "doubled"),
        ],
        {"a": (FLOAT, [1, "classes", 4]), "b": (FLOAT, [1, 3, 4])},
        {"scores": (FLOAT, [1, "classes", 3]), "doubled": (FLOAT, [1, 3, 4])},
    )
