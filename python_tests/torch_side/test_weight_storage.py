"""Weights in half the bytes: only where nothing is lost, and the graph computes the same."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.writer import save_onnx

ROWS = 40
WEIGHT, HALF, BIAS = "/MatMul.1", "/MatMul.1.half", "/Add.1"


def linear_graph(weight, bias):
    graph = Graph()
    graph.output("y", graph.add(graph.matmul(graph.input("x", (2, ROWS)), weight), bias))
    return graph.network()


def random_halves():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, ROWS)).astype(np.float16).astype(np.float32)


def stored_types(model):
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def store(model, folder, precision="float32"):
    save_graphs({"linear": lambda: model}, folder, (precision,))
    return onnx.load(folder / f"linear.{precision}.onnx")


def test_exact_weights_take_half_the_bytes_and_give_the_same_numbers(tmp_path):
    model = linear_graph(random_halves(), np.ones(ROWS, np.float32))
    stored = store(model, tmp_path)
    assert stored_types(stored) == {HALF: TensorProto.FLOAT16, BIAS: TensorProto.FLOAT}
    save_onnx(model, "linear", tmp_path / "plain.onnx")
    plain = onnx.load(tmp_path / "plain.onnx")
    assert stored.ByteSize() < 0.55 * plain.ByteSize()
    x = np.random.default_rng(1).standard_normal((2, ROWS)).astype(np.float32)
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
        for m in (plain, stored)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("value", [1 + 2**-20, 1e6, 1e-9, np.nan])
def test_one_inexact_number_keeps_the_weight(value, tmp_path):
    weight = random_halves()
    weight[3, 4] = value
    stored = store(linear_graph(weight, np.ones(ROWS, np.float32)), tmp_path)
    assert stored_types(stored) == {WEIGHT: TensorProto.FLOAT, BIAS: TensorProto.FLOAT}
    kept = numpy_helper.to_array(stored.graph.initializer[0])
    np.testing.assert_array_equal(kept, weight)


@pytest.mark.parametrize("version", [17, 20, 21])
def test_a_graph_keeps_its_operator_set(version, tmp_path):
    model = linear_graph(random_halves(), np.ones(ROWS, np.float32))
    assert store(replace(model, opset=version), tmp_path).opset_import[0].version == version


def test_bfloat16_rounds_as_torch_does(tmp_path):
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((ROWS, ROWS)) * 10.0 ** rng.integers(-38, 38, ROWS)).astype("f4")
    weight[0, :8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8
    stored = store(linear_graph(weight, np.ones(ROWS, np.float32)), tmp_path, "bfloat16")
    held = {one.name: one for one in stored.graph.initializer}
    assert {one.data_type for one in held.values()} == {TensorProto.BFLOAT16}
    found = numpy_helper.to_array(held[HALF]).astype(np.float32)
    expected = torch.from_numpy(weight).bfloat16().float().numpy()
    np.testing.assert_array_equal(found, expected)
