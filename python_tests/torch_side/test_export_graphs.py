"""The exported graphs: their operators, their float16 form, and every backend's agreement."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support.errors import refused
from support.graphs import to_float16, write_graph
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend, is_installed
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.errors import CheckpointError

OPTIONS = BackendOptions(num_threads=1)


@pytest.fixture(scope="module")
def bundle(zegclip_bundle):
    return Bundle.load(zegclip_bundle)


@pytest.fixture(scope="module")
def golden(bundle):
    with np.load(bundle.path / "golden.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def graph_files(bundle):
    for name, variants in bundle.graphs.items():
        for precision, entry in variants.items():
            yield f"{name}.{precision}", onnx.load(bundle.path / entry.file)


def test_image_encoder_keeps_one_attention_a_block(bundle, zegclip_model):
    model = dict(graph_files(bundle))["image_encoder.float32"]
    counts = [node.op_type for node in model.graph.node]
    layers = zegclip_model.config.image_encoder.num_layers
    assert counts.count("Softmax") == layers
    assert counts.count("LayerNormalization") == 2 * layers + 3  # ln_pre, prompt_norm, ln_post


@pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_torch_lowers_a_float32_graph(bundle, golden, precision):
    entry = bundle.graphs["image_encoder"]["float32"]
    session = (
        get_backend("torch")
        .load(bundle.path / entry.file, device="cpu", precision=precision, options=OPTIONS)
        .session()
    )
    assert session.precision == precision
    found = session.run({"image": golden["image"]})["patch_embeds"]
    assert found.dtype == np.float32
    error = np.abs(found - golden["patch_embeds"]).max() / np.abs(golden["patch_embeds"]).max()
    assert 0 < error < 8e-2  # 8 significant bits through four blocks; worst seen 1.5e-2


def test_onnxruntime_agrees(bundle, golden):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name, variants in bundle.graphs.items():
        entry = variants["float32"]
        session = onnxruntime.InferenceSession(
            bundle.path / entry.file, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {spec.name: golden[spec.name] for spec in entry.inputs})
        for spec, value in zip(entry.outputs, found, strict=True):
            stage = "prompt_embeds" if spec.name == "text_embeds" else spec.name
            np.testing.assert_allclose(value, golden[stage], atol=2e-5, err_msg=f"{name} {stage}")


def test_weight_beyond_float16_is_named():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "huge"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor("huge", TensorProto.FLOAT, [1, 1], [1e6])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with refused(CheckpointError, "huge", "65504"):
        to_float16(model)


def test_float16_survives_what_overflows(tmp_path):
    """LayerNorm of values whose squares exceed float16, and softmax of large logits."""
    path = write_graph(
        tmp_path / "norm.onnx",
        [
            helper.make_node("LayerNormalization", ["x", "scale"], ["normed"], axis=-1),
            helper.make_node("ReduceL2", ["x", "last"], ["length"], keepdims=1),
            helper.make_node("Div", ["x", "length"], ["unit"]),
            helper.make_node("Add", ["normed", "unit"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [4, 64])},
        {"y": (TensorProto.FLOAT, [4, 64])},
        {"scale": np.ones(64, np.float32), "last": np.array([-1], np.int64)},
    )
    half = tmp_path / "half.onnx"
    onnx.save(to_float16(onnx.load(path)), half)
    x = (3e4 * np.random.default_rng(0).standard_normal((4, 64))).clip(-6e4, 6e4).astype(np.float32)
    session = (
        get_backend("torch").load(half, device="cpu", precision="auto", options=OPTIONS).session()
    )
    centred = x - x.mean(axis=1, keepdims=True)
    expected = centred / centred.std(axis=1, keepdims=True)
    expected += x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=5e-3)
