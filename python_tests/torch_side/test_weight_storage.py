"""Weights in half the bytes: only where nothing is lost, and the graph computes the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.export.float16 import store_exact_halves
from zsseg_rt.export.graph_files import save_variants

ROWS = 40


def linear_graph(weight, bias):
    value = helper.make_tensor_value_info
    weights = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [value("x", TensorProto.FLOAT, [2, ROWS])],
        [value("y", TensorProto.FLOAT, [2, ROWS])],
        weights,
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def random_halves():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, ROWS)).astype(np.float16).astype(np.float32)


def stored_types(model):
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_exact_weights_take_half_the_bytes_and_give_the_same_numbers():
    model = linear_graph(random_halves(), np.ones(ROWS, np.float32))
    stored = store_exact_halves(model)
    assert stored_types(stored) == {"weight.half": TensorProto.FLOAT16, "bias": TensorProto.FLOAT}
    assert stored.ByteSize() < 0.55 * model.ByteSize()
    x = np.random.default_rng(1).standard_normal((2, ROWS)).astype(np.float32)
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
        for m in (model, stored)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("value", [1 + 2**-20, 1e6, 1e-9, np.nan])
def test_one_inexact_number_keeps_the_weight(value):
    weight = random_halves()
    weight[3, 4] = value
    model = linear_graph(weight, np.ones(ROWS, np.float32))
    assert store_exact_halves(model) is model


def test_both_files_store_what_float16_holds(tmp_path):
    model = linear_graph(random_halves(), np.ones(ROWS, np.float32))
    save_variants(model, "linear", tmp_path, ("float32", "float16"))
    single, half = (onnx.load(tmp_path / f"linear.{p}.onnx") for p in ("float32", "float16"))
    assert stored_types(single)["weight.half"] == TensorProto.FLOAT16
    assert set(stored_types(half).values()) == {TensorProto.FLOAT16}
