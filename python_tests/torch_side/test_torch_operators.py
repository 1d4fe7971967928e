"""Operators of backend torch that ZegFormer and CNN encoders use, against ONNX Runtime."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from support.errors import refused  # noqa: E402
from support.graphs import write_graph  # noqa: E402
from zsseg_rt.backends._torch_graph.program import Program  # noqa: E402
from zsseg_rt.errors import BackendError  # noqa: E402

X = np.random.default_rng(0).standard_normal((2, 3, 9, 7)).astype(np.float32)


def write(path, node, constants=None, outputs=("y",)):
    axes = [f"axis{index}" for index in range(4)]
    specs = dict.fromkeys(outputs, (TensorProto.FLOAT, axes))
    kinds = {"x": (TensorProto.FLOAT, list(X.shape))}
    return write_graph(path / "g.onnx", [node], kinds, specs, constants)


def run_torch(path):
    program = Program.read(path)
    program.place(torch.device("cpu"), None)
    with torch.inference_mode():
        return {name: held.numpy() for name, held in program.run({"x": torch.tensor(X)}).items()}


def assert_equal_to_onnxruntime(path, tolerance=2e-6):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": X})
    (actual,) = run_torch(path).values()
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


POOLS = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},  # ResNet's
    {"kernel_shape": [2, 3]},  # strides are 1
    {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 0, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [3, 3], "strides": [3, 3], "auto_pad": "SAME_LOWER"},
]


@pytest.mark.parametrize("attributes", [*POOLS, {"kernel_shape": [2, 2], "dilations": [2, 3]}])
def test_max_pool(tmp_path, attributes):
    node = helper.make_node("MaxPool", ["x"], ["y"], **attributes)
    assert_equal_to_onnxruntime(write(tmp_path, node))


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("attributes", POOLS)
def test_average_pool(tmp_path, attributes, include):
    node = helper.make_node("AveragePool", ["x"], ["y"], count_include_pad=include, **attributes)
    assert_equal_to_onnxruntime(write(tmp_path, node))


def test_a_second_result_of_max_pool_is_refused(tmp_path):
    node = helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 2])
    path = write(tmp_path, node)
    with refused(BackendError, None, "MaxPool"):
        run_torch(path)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [4, 3]},
        {"strides": [2, 3], "output_padding": [1, 2], "dilations": [2, 1]},
    ],
)
def test_conv_transpose(tmp_path, attributes):
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)
    rng = np.random.default_rng(1)
    held = {"w": rng.standard_normal((3, 2, 4, 3)), "b": rng.standard_normal(2)}
    held = {name: values.astype(np.float32) for name, values in held.items()}
    assert_equal_to_onnxruntime(write(tmp_path, node, held), tolerance=1e-5)


@pytest.mark.parametrize("attributes", [{"pads": [0, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_uneven_padding_of_conv_transpose_is_refused(tmp_path, attributes):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)
    path = write(tmp_path, node, {"w": np.zeros((3, 2, 3, 3), np.float32)})
    with refused(BackendError, None, "ConvTranspose"):
        run_torch(path)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_elu(tmp_path, alpha):
    assert_equal_to_onnxruntime(write(tmp_path, helper.make_node("Elu", ["x"], ["y"], alpha=alpha)))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
def test_gemm(tmp_path, trans_a, trans_b, with_bias):
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((6, 7)).astype(np.float32)
    held = {"a": np.ascontiguousarray(rows.T if trans_a else rows)}
    columns = rng.standard_normal((7, 7)).astype(np.float32)
    held |= {"b": columns, "c": rng.standard_normal(7).astype(np.float32)}
    scales = {"alpha": 0.5, "beta": 3.0}
    names = ["a", "b", "c"] if with_bias else ["a", "b"]
    nodes = [
        helper.make_node("Gemm", names, ["product"], transA=trans_a, transB=trans_b, **scales),
        helper.make_node("Slice", ["product", "starts", "ends"], ["row"]),
        helper.make_node("Mul", ["x", "row"], ["y"]),  # graphs are fed with x
    ]
    held |= {"starts": np.array([0, 0]), "ends": np.array([1, 7])}
    axes = [f"axis{index}" for index in range(4)]
    feeds = {"x": (TensorProto.FLOAT, list(X.shape))}
    path = tmp_path / "g.onnx"
    write_graph(path, nodes, feeds, {"y": (TensorProto.FLOAT, axes)}, held)
    assert_equal_to_onnxruntime(path, tolerance=1e-5)


def test_instance_normalization(tmp_path):
    node = helper.make_node("InstanceNormalization", ["x", "scale", "bias"], ["y"], epsilon=1e-3)
    held = {"scale": np.array([1, -2, 0.5], np.float32), "bias": np.array([0, 3, -1], np.float32)}
    assert_equal_to_onnxruntime(write(tmp_path, node, held), tolerance=1e-5)


def resize(path, *, sizes=None, scales=None, **attributes):
    held, names = {}, ["x", "", ""]
    if sizes is not None:
        names.append("sizes")
        held["sizes"] = np.array(sizes)
    else:
        names[2] = "scales"
        held["scales"] = np.array(scales, np.float32)
    return write(path, helper.make_node("Resize", names, ["y"], **attributes), held)


FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CORNERS = {"coordinate_transformation_mode": "align_corners"}
TORCHS = {"coordinate_transformation_mode": "pytorch_half_pixel"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "nearest", **FLOOR},
        {"mode": "nearest"},
        {"mode": "linear"},
        {"mode": "linear", **CORNERS},
        {"mode": "linear", **TORCHS},
        {"mode": "cubic"},
        {"mode": "cubic", **CORNERS},
    ],
    ids=lambda attributes: "-".join(map(str, attributes.values())),
)
@pytest.mark.parametrize("height_width", [(18, 14), (13, 20), (4, 5)])
def test_resize_to_a_size(tmp_path, attributes, height_width):
    path = resize(tmp_path, sizes=[2, 3, *height_width], **attributes)
    assert_equal_to_onnxruntime(path, tolerance=1e-5)


@pytest.mark.parametrize("attributes", [{"mode": "nearest", **FLOOR}, {"mode": "linear"}])
@pytest.mark.parametrize("factors", [(2, 2), (1.5, 2.25), (0.6, 1)])
def test_resize_by_factors(tmp_path, attributes, factors):
    """The places follow the factors, also where the sizes are rounded."""
    path = resize(tmp_path, scales=[1, 1, *factors], **attributes)
    assert_equal_to_onnxruntime(path, tolerance=1e-5)


def test_resize_of_some_axes(tmp_path):
    path = resize(tmp_path, sizes=[18, 14], axes=[2, 3], mode="linear")
    assert_equal_to_onnxruntime(path, tolerance=1e-5)


def test_smoothed_resize(tmp_path):
    path = resize(tmp_path, sizes=[2, 3, 4, 3], mode="linear", antialias=1, exclude_outside=1)
    assert_equal_to_onnxruntime(path, tolerance=1e-5)


@pytest.mark.parametrize(
    ("sizes", "attributes", "message"),
    [
        ([2, 3, 3, 7], {"mode": "nearest", "nearest_mode": "ceil"}, "expected a rule"),
        ([2, 3, 5, 5], {"mode": "cubic", "cubic_coeff_a": -0.5}, "cubic_coeff_a=-0.5"),
        ([2, 3, 1, 7], {"mode": "linear", **TORCHS}, "pytorch_half_pixel"),
        ([2, 6, 9, 7], {"mode": "linear"}, "got other axes"),
        ([2, 3, 5, 5], {"mode": "linear", "exclude_outside": 1}, "exclude_outside=0"),
        ([2, 3, 5, 5], {"mode": "linear", "antialias": 1}, "exclude_outside=1"),
    ],
)
def test_rules_that_torch_lacks_are_refused(tmp_path, sizes, attributes, message):
    path = resize(tmp_path, sizes=sizes, **attributes)
    with pytest.raises(BackendError, match=f"Resize .*{message}"):
        run_torch(path)


def test_halves_that_are_rounded_down_are_refused(tmp_path):
    """torch rounds them up."""
    path = resize(tmp_path, scales=[1, 1, 0.5, 1], mode="nearest")
    with refused(BackendError, None, "round_prefer_floor"):
        run_torch(path)
    upwards = resize(tmp_path, scales=[1, 1, 0.5, 1], nearest_mode="round_prefer_ceil")
    assert_equal_to_onnxruntime(upwards)
