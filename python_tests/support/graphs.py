"""Small ONNX graphs for tests of backends, written with the onnx package."""

from io import BytesIO
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.writer import write_onnx

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("org.example", 1)]


def to_float16(model, half=()):
    """The float16 version of a float32 graph, checked; inputs and outputs in ``half`` too."""
    stream = BytesIO()
    network = read_network(model.SerializeToString())
    write_onnx(to_half(network, half=half), "test", stream)
    half_model = onnx.load_model_from_string(stream.getvalue())
    onnx.checker.check_model(half_model)
    return half_model


def write_graph(path: Path, nodes, inputs, outputs, weights=None) -> Path:
    """Write a graph; ``inputs`` and ``outputs`` map names to (dtype code, shape)."""

    def values(specs):
        return [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in specs.items()]

    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", values(inputs), values(outputs), tensors)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_two_inputs(path: Path) -> Path:
    """``a`` [1, classes, 4], ``b`` [1, 3, 4] to ``scores`` [1, classes, 3] and ``doubled``."""
    return write_graph(
        path,
        [
            helper.make_node("Transpose", ["b"], ["bt"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["a", "bt"], ["scores"]),
            helper.make_node("Add", ["b", "b"], ["doubled"]),
        ],
        {"a": (TensorProto.FLOAT, [1, "classes", 4]), "b": (TensorProto.FLOAT, [1, 3, 4])},
        {
            "scores": (TensorProto.FLOAT, [1, "classes", 3]),
            "doubled": (TensorProto.FLOAT, [1, 3, 4]),
        },
    )
