"""Operators compute what ONNX says, in NumPy and torch; no graph that could do harm is run."""

import copy
import itertools
import tracemalloc

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from support.errors import refused
from support.graphs import FLOAT, make_graph, node, write_graph
from support.operator_graphs import INT32, INT64, SAMPLES, Fed, Sample, floats, ints, operator_model
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.errors import ArgumentError, BackendError
from zsseg_rt.onnx.arrays import NUMPY, compute
from zsseg_rt.onnx.check import Flow, check_graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.on_torch import OnTorch
from zsseg_rt.onnx.operations import DTYPES
from zsseg_rt.onnx.reader import OPSETS, read_network
from zsseg_rt.onnx.table import OPERATORS, newest

LIBRARIES = {"numpy": NUMPY, "torch": OnTorch(torch)}
LEFT_TO_RUNTIMES = {"DequantizeLinear", "QuantizeLinear"}
POSITIVE = ("Log", "Sqrt", "Pow", "ReduceLogSum")


def check(model):
    return check_graph(memoryview(model.SerializeToString()), "g.onnx")


def load(path, backend="openvino"):
    options = BackendOptions(num_threads=1)
    return get_backend(backend).load(path, device="cpu", precision="float32", options=options)


# --- what they compute ----------------------------------------------------------------------------


def computed(model, feeds, library):
    """The table's results for a graph of one node."""
    network = read_network(model.SerializeToString())
    node = newest(network.nodes[0], network.opset)
    values = {name: weight.array for name, weight in network.weights.items()} | feeds
    inputs = [values[name] if name else None for name in node.inputs]
    if library == "torch":
        host = OPERATORS[node.kind].host
        inputs = [
            torch.from_numpy(np.array(each)) if each is not None and at < host else each
            for at, each in enumerate(inputs)
        ]
    results = compute(node.kind, inputs, node.attributes, LIBRARIES[library])
    return results if isinstance(results, tuple) else (results,)


def feeds_of(model, seed=0, positive=False):
    feeds, rng = {}, np.random.default_rng(seed)
    for spec in read_network(model.SerializeToString()).inputs:
        values = rng.standard_normal(spec.shape) * 3
        values = np.abs(values) + 0.1 if positive else values
        feeds[spec.name] = values > 0 if spec.dtype == "bool" else values.astype(spec.dtype)
    return feeds


def assert_computes(model, feeds, expected, tolerance=2e-5):
    for library in LIBRARIES:
        for actual, wanted in zip(computed(model, feeds, library), expected, strict=True):
            actual, wanted = np.asarray(actual), np.asarray(wanted)
            assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
            actual, wanted = actual.astype(np.float64), wanted.astype(np.float64)
            np.testing.assert_allclose(actual, wanted, tolerance, tolerance, err_msg=library)


def test_most_operators_are_computed():
    assert set(SAMPLES) == set(OPERATORS)
    assert {name for name in OPERATORS if OPERATORS[name].run is None} == LEFT_TO_RUNTIMES


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_equals_the_reference(name):
    """Also its sizes, as the check follows them, where onnx infers them."""
    model = operator_model(name, SAMPLES[name])
    values = Flow(read_network(model.SerializeToString())).run().values
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value in inferred.graph.output:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        if tensor.HasField("shape"):
            result = values[value.name]
            assert (result.dtype, result.shape) == (DTYPES[tensor.elem_type], shape)
    for seed in range(3 if name not in LEFT_TO_RUNTIMES else 0):
        feeds = feeds_of(model, seed, positive=name in POSITIVE)
        assert_computes(model, feeds, ReferenceEvaluator(model).run(None, feeds))


def _drawn(draw, name):
    """A sample with drawn sizes and attributes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    axes = ints(*draw(st.sets(st.sampled_from(range(len(shape))), min_size=1)))
    size, place, step = shape[axis], st.integers(-6, 6), st.sampled_from((-2, -1, 1, 2))
    inputs, attributes = {
        "Reduce": lambda: ([axes], {"keepdims": draw(st.integers(0, 1))}),
        "Softmax": lambda: ([], {"axis": axis}),
        "LogSoftmax": lambda: ([], {"axis": axis}),
        "Concat": lambda: ([Fed(shape)] * draw(st.integers(0, 2)), {"axis": axis}),
        "Transpose": lambda: ([], {"perm": draw(st.permutations(range(len(shape))))}),
        "Unsqueeze": lambda: ([ints(*(axes % (len(shape) + len(axes))))], {}),
        "Gather": lambda: (
            [ints(*draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=5)))],
            {"axis": axis},
        ),
        "Slice": lambda: ([ints(draw(place)), ints(draw(place)), ints(axis), ints(draw(step))], {}),
        "Tile": lambda: ([ints(*[draw(st.integers(1, 3)) for _ in shape])], {}),
        "Pad": lambda: (
            [ints(*[draw(st.integers(0, size - 1)) for size in shape * 2])],
            {"mode": draw(st.sampled_from(("constant", "reflect", "edge")))},
        ),
        "TopK": lambda: (
            [ints(draw(st.integers(1, size)))],
            {"axis": axis, "largest": draw(st.integers(0, 1))},
        ),
    }.get(
        "Reduce" if name.startswith("Reduce") else name,
        lambda: ([floats(*[draw(st.sampled_from((1, n))) for n in shape[axis:]])], {}),
    )()
    return Sample([Fed(shape), *inputs], attributes, (FLOAT, 7) if name == "TopK" else (FLOAT,))


DRAWN = """Add Concat Gather Max Mul Pad ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceProd
ReduceSum Slice Softmax LogSoftmax Tile TopK Transpose Unsqueeze"""


@pytest.mark.parametrize("name", DRAWN.split())
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_sizes_and_attributes(name, data):
    model = operator_model(name, _drawn(data.draw, name))
    feeds = feeds_of(model, data.draw(st.integers(0, 99)))
    assert_computes(model, feeds, ReferenceEvaluator(model).run(None, feeds))


POOLS = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},  # ResNet's
    {"kernel_shape": [2, 3]},  # strides are 1
    {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 0, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [3, 3], "strides": [3, 3], "auto_pad": "SAME_LOWER"},
]
FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CORNERS = {"coordinate_transformation_mode": "align_corners"}
TORCHS = {"coordinate_transformation_mode": "pytorch_half_pixel"}
RESIZES = [
    {"mode": "nearest", **FLOOR}, {"mode": "nearest"}, {"mode": "nearest", "nearest_mode": "ceil"},
    {"mode": "linear"}, {"mode": "linear", **CORNERS}, {"mode": "linear", **TORCHS},
    {"mode": "cubic"}, {"mode": "cubic", **CORNERS}, {"mode": "cubic", "cubic_coeff_a": -0.5},
    {"mode": "cubic", "exclude_outside": 1},
    {"mode": "linear", "antialias": 1, "exclude_outside": 1},
]  # fmt: skip
SIZES = [[None, None, ints(2, 3, *size)] for size in ((18, 14), (13, 20), (4, 5))]
SIZES += [[None, np.array([1, 1, 1.5, 2.25], np.float32)]]
CONV, TURNED = [floats(4, 3, 3, 2), floats(4)], [floats(3, 2, 4, 3), floats(2)]
WINDOWS = [
    *[("MaxPool", [], each) for each in [*POOLS, {"kernel_shape": [2, 2], "dilations": [2, 3]}]],
    *[("AveragePool", [], {**each, "count_include_pad": i}) for each in POOLS for i in (0, 1)],
    ("Conv", CONV, {}),
    ("Conv", CONV, {"strides": [2, 2], "pads": [1, 0, 2, 1]}),
    ("Conv", CONV, {"auto_pad": "SAME_LOWER"}),
    ("Conv", [floats(6, 1, 3, 3)], {"group": 3, "dilations": [2, 1]}),
    ("ConvTranspose", TURNED, {}),
    ("ConvTranspose", TURNED, {"strides": [2, 2], "pads": [1] * 4, "kernel_shape": [4, 3]}),
    ("ConvTranspose", TURNED, {"strides": [2, 3], "output_padding": [1, 2], "dilations": [2, 1]}),
    *[("Resize", sizes, each) for each in RESIZES for sizes in SIZES],
    ("Gemm", [floats(9, 5), floats(5)], {"alpha": 0.5, "beta": 3.0}),
    ("Gemm", [floats(5, 9), floats(5)], {"transB": 1, "alpha": 0.5, "beta": 3.0}),
]


@pytest.mark.parametrize(("name", "inputs", "attributes"), WINDOWS)
def test_windows_and_sizes_are_those_of_onnxruntime(name, inputs, attributes):
    image = [7, 9] if name == "Gemm" else [2, 3, 9, 7]
    model = operator_model(name, Sample([Fed(image), *copy.deepcopy(inputs)], attributes))
    feeds, session = feeds_of(model), onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, feeds)
    assert_computes(model, feeds, expected)
    values = Flow(read_network(model.SerializeToString())).run().values
    assert values[model.graph.output[0].name].shape == expected[0].shape
    halved = Flow(to_half(read_network(model.SerializeToString()))).run().values
    assert halved[model.graph.output[0].name].shape == expected[0].shape


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_older_softmax_takes_all_axes_behind(name):
    model = operator_model(name, Sample([Fed([2, 3, 4])], {}, opset=11))
    rows, feeds = operator_model(name, Sample([Fed([2, 12])], {"axis": 1})), feeds_of(model)
    expected = ReferenceEvaluator(rows).run(None, {"i0": feeds["i0"].reshape(2, 12)})
    assert_computes(model, feeds, [expected[0].reshape(2, 3, 4)])


def test_an_index_of_the_host_outside_its_axis_is_refused():
    x = np.zeros((2, 3), np.float32)
    for library, array in (("numpy", x), ("torch", torch.from_numpy(x))):
        with pytest.raises(IndexError, match="expected indices from -2 to 1"):
            compute("Gather", (array, ints(2)), {}, LIBRARIES[library])


# --- what is refused ------------------------------------------------------------------------------

BEYOND = {
    "Gather": [ints(0, 6), ints(-7)],
    "GatherElements": [np.array([[0, 6], [1, 2]]), np.array([[0, 0], [-7, 0]])],
    "GatherND": [np.array([[0, 6]]), np.array([[2, 0]]), np.array([[-3, 0]]), ints(2**40, 0)],
    "ScatterND": [np.array([[0, 5], [-3, 2]]), np.array([[0, 2**33], [1, 2]])],
}


@pytest.mark.parametrize("name", BEYOND)
def test_indices_outside_their_axis_and_fed_ones_are_refused(name):
    sample = copy.deepcopy(SAMPLES[name])
    fed = [Fed(list(sample.inputs[1].shape), INT64)] if name != "Gather" else []
    for sample.inputs[1] in [*BEYOND[name], *fed]:
        with pytest.raises(BackendError, match=rf"node 'node' \({name}\): indices: expected const"):
            check(operator_model(name, sample))


PICTURE, KERNEL = Fed([1, 4, 6, 6]), floats(6, 4, 3, 3)
X, COUNTS, HEADS = Fed([2, 6]), Fed([2], INT64), Fed([1, 2, 5, 8])
ODD = [
    ("NonZero", [Fed([1, 4, 4])], {}, "that encoders use"),
    ("Relu", [Fed([2])], {"alpha": 1.0}, "expected attributes of Relu"),
    ("Concat", [Fed([2])], {"axis": 1.0}, "got 'axis'"),
    ("Pad", [Fed([2]), ints(0, 0)], {"mode": "wrap"}, "mode: expected one of constant"),
    ("Softmax", [X], {"axis": 2}, "axis 2: expected one of 2 axes"),
    ("Concat", [ints(0), ints(1)], {}, "axis: expected one"),
    ("ReduceMean", [X, ints(1, -1)], {}, "axes: expected each axis once"),
    ("Reshape", [X, ints(0, 0, 0)], {}, "expected 0 only for"),
    ("Reshape", [X, ints(-1, -1)], {}, "at most one -1"),
    ("Reshape", [X, ints(5, -1)], {}, "expected one for"),
    ("Conv", [PICTURE, floats(6, 1, 3, 3)], {"group": 3}, "channels"),
    ("Conv", [Fed([1, 4, 2, 6]), KERNEL], {}, "at most 2 pixels"),
    ("Conv", [PICTURE, KERNEL], {"strides": [0, 1]}, "1 to 65536, got .0"),
    ("MaxPool", [PICTURE], {"kernel_shape": [2, 2], "dilations": [0, 1]}, "1 to 65536"),
    ("MaxPool", [PICTURE], {"kernel_shape": [2, 2], "pads": [0, 2, 0, 0]}, "pads: exp"),
    ("Pad", [X, ints(0, 6, 0, 0)], {"mode": "reflect"}, "expected 0 to 5 with mode"),
    ("Pad", [X, ints(-2, 0, 0, 0)], {}, "expected some of size 2"),
    ("Split", [X, ints(1)], {"axis": 1}, "split: expected 1"),
    ("Slice", [X, ints(0), ints(1), ints(0), ints(0)], {}, "steps: exp"),
    ("Slice", [X, ints(5), ints(5), ints(1)], {}, "expected a result"),
    ("ReduceMax", [Fed([1, 4, 0, 8]), ints(1, 2)], {}, "inputs with elements"),
    ("Squeeze", [Fed(["n", 6]), ints(0)], {}, "axes: expected axes"),
    ("Tile", [Fed(["n", 6]), ints(1, 2**22)], {}, "sizes of 0 or more"),
    ("TopK", [X, ints(7)], {}, "k: expected 1 to 6"),
    ("Div", [COUNTS, ints(0)], {}, "divisor: expected constants of 1"),
    ("Div", [COUNTS, ints(-1)], {}, "divisor: expected constants of 1"),
    ("Mod", [COUNTS, COUNTS], {}, "divisor: expected"),
    ("MatMul", [X, floats(5, 3)], {}, "inner sizes"),
    ("Add", [Fed([2]), ints(1, 2)], {}, "inputs of one type"),
    ("Resize", [PICTURE, None, floats(4) * 1e9], {}, "scales: expected"),
    ("Resize", [PICTURE, None, floats(4) * 1e-9], {}, "1 or more"),
    ("QuantizeLinear", [PICTURE, floats(3)], {}, "one or 4 numbers"),
    ("Einsum", [Fed([2, 3]), Fed([2, 3])], {"equation": "ij,jk->ik"}, "sizes of j: expected"),
    ("TopK", [X, ints(0)], {}, "k: expected 1 to 6"),
    ("Concat", [X, Fed([2])], {"axis": 0}, "one rank and type"),
    ("Concat", [Fed([2]), COUNTS], {"axis": 0}, "one rank and"),
    ("Concat", [X, Fed([2, 5])], {"axis": 0}, "in axis 0 alone"),
    ("GatherND", [X, np.zeros((1, 3), np.int64)], {}, "tuples"),
    ("GatherND", [X, np.zeros((1, 0), np.int64)], {}, "with elements"),
    ("GatherND", [X, np.zeros((3, 1), np.int64)], {"batch_dims": 1}, "batch_dims: exp"),
    (
        "ConvTranspose",
        [PICTURE, floats(4, 2, 3, 3)],
        {"strides": [2, 2], "output_padding": [2, 0]},
        "an image to be left",
    ),
    ("ScatterND", [X, np.array([[0], [1]]), floats(2, 5)], {}, "updates: expected"),
    ("Attention", [HEADS, Fed([1, 2, 5, 4]), HEADS], {}, "that fit"),
    ("Attention", [*[HEADS] * 3, floats(3, 2, 5, 5)], {}, "attn_mask: expected one"),
    ("Einsum", [Fed(["n"]), Fed([3]), Fed([4])], {"equation": "i,i,i->i"}, "sizes of i: expected"),
    ("DequantizeLinear", [Fed([2, 6], 4), floats()], {}, "8 bits"),
    ("Einsum", [Fed([2, 3])], {"equation": "ij->ii"}, "letters of the terms"),
    ("Einsum", [Fed([2, 3])], {"equation": "ij->ik"}, "letters of the terms"),
    ("Einsum", [Fed([2, 2])], {"equation": "ii->i"}, "each once, not 'ii'"),
    ("Max", [X, None], {}, r"inputs, got \['i0', None\]"),
    ("DepthToSpace", [PICTURE], {}, "blocksize: expected"),
    ("MaxPool", [PICTURE], {"kernel_shape": [3, 0]}, r"kernel_shape: .* got \[3, 0\]"),
    ("MaxPool", [PICTURE], {"kernel_shape": [3, 3], "pads": [2**20] * 4}, "pads: exp"),
    ("ConstantOfShape", [ints(2_000_000_000)], {}, r"\[2000000000\]"),
    ("ConstantOfShape", [ints(-1)], {}, r"expected sizes .*\[-1\]"),
    ("Expand", [X, ints(100_000, 2000, 2, 6)], {}, "expected sizes"),
    ("Tile", [X, ints(2**14, 2**13)], {}, "expected sizes"),
    ("Resize", [PICTURE, None, np.float32([1, 1, 2, np.inf])], {}, "scales: expected"),
    ("Resize", [PICTURE, None, None, ints(1, 4, 2**20, 2**20)], {}, "expected sizes"),
    ("Range", [np.array(0), np.array(2**40), np.array(1)], {}, "expected sizes"),
    ("Range", [np.array(0), np.array(5), np.array(0)], {}, "expected finite numbers and a step"),
    ("Pad", [PICTURE, ints(*[0, 0, 2**15, 2**15] * 2)], {}, "expected sizes"),
]


@pytest.mark.parametrize(("name", "inputs", "attributes", "message"), ODD)
def test_odd_node_is_refused(name, inputs, attributes, message):
    results, opset = (FLOAT, INT64)[: 1 + (name == "TopK")], 23 if name == "Attention" else 20
    model = operator_model(name, Sample(inputs, attributes, results, opset))
    with pytest.raises(BackendError, match=rf"node 'node' \({name}\): (.*){message}"):
        check(model)


def chain(nodes, weights, inputs=None, outputs=None):
    """A graph of several nodes from ``x`` [2, 6] to ``y``."""
    fed, results = inputs or {"x": (FLOAT, [2, 6])}, outputs or {"y": (FLOAT, None)}
    return make_graph(nodes, fed, results, weights)


@pytest.mark.parametrize(("kind", "shape"), [(FLOAT, [2, 7]), (FLOAT, [2]), (INT32, [2, 6])])
def test_an_output_that_contradicts_the_nodes_is_refused(kind, shape):
    model = chain([node("Relu", "x", "y")], {}, outputs={"y": (kind, shape)})
    with pytest.raises(BackendError, match="graph output 'y': expected what it computes, float32"):
        check(model)


LARGEST = node("ArgMax", "x", "a", axis=1)  # of an axis of 6
TOP = node("TopK", "x three", "v a", axis=1)
NUMBERS = {
    name: np.array(value, np.int64)
    for name, value in {
        "zero": 0, "one": 1, "first": [0], "second": [1], "three": [3], "pair": [[0, -6], [5, 1]],
        "three2": [2, 3], "seven": [[0], [7]],
    }.items()
}  # fmt: skip
BOUNDED = [
    [LARGEST, node("Cast", "a", "i", to=INT32)],
    [node("ArgMin", "x", "a", axis=0), node("Reshape", "a three2", "i")],
    [TOP, node("Slice", "a first second second", "i")],
    [TOP, node("Concat", "a pair", "i", axis=1)],
    [node("Cast", "pair", "c", to=INT32), node("Slice", "c first second", "i")],
]
UNBOUNDED = [
    [node("Cast", "x", "i", to=INT64)],
    [LARGEST, node("Add", "a one", "i")],
    [node("Concat", "x x", "t", axis=1), node("ArgMax", "t", "i", axis=1)],
    [node("Concat", "pair seven", "i", axis=1)],
    [node("Shape", "x", "s"), node("Slice", "s first second", "i")],
    [node("ConstantOfShape", "three", "i", value=numpy_helper.from_array(ints(0)))],
    [LARGEST, node("Gather", "a first", "i", axis=0)],
    [LARGEST, node("Transpose", "a", "i")],
]


@pytest.mark.parametrize("nodes", [*BOUNDED, *UNBOUNDED])
def test_indices_are_constants_or_places(nodes):
    """Columns of ``x`` [2, 6] are picked by what other nodes compute."""
    model = chain([*nodes, node("Gather", "x i", "y", axis=1)], NUMBERS)
    if nodes in BOUNDED:
        check(model)
    else:
        with pytest.raises(BackendError, match=r"node 'y' \(Gather\): indices: expected constants"):
            check(model)


EXTREMES = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 65])
@pytest.mark.parametrize("name", ["ArgMax", "ArgMin", "TopK"])
def test_places_are_inside_their_axis_whatever_is_fed(name, size, tmp_path):
    """So OpenVINO may take them as indices: each of its kernels, with NaN and infinities."""
    rng = np.random.default_rng(size)
    fed = [np.full((3, size, 5), value, np.float32) for value in EXTREMES]
    fed += [rng.choice(np.array(EXTREMES, np.float32), (3, size, 5)) for _ in range(4)]
    nodes = [node(name, "x", f"y{a}", axis=1, select_last_index=a) for a in (0, 1)]
    if name == "TopK":
        nodes = [
            node(name, f"x k{k}", f"v{k}{a}{b} y{k}{a}{b}", axis=1, largest=a, sorted=b)
            for k, a, b in itertools.product((0, 1, 2), (0, 1), (0, 1))
        ]
    outputs = {each.output[-1]: (INT64, None) for each in nodes} | {"t": (INT32, None)}
    first = nodes[0].output[-1]
    nodes += [node("Concat", f"{first} {first}", "c", axis=1), node("Reshape", "c flat", "r")]
    nodes += [node("Slice", "r k0 far", "s"), node("Cast", "s", "t", to=INT32)]
    weights = {"k0": ints(1), "k1": ints((size + 1) // 2), "k2": ints(size)}
    weights |= {"flat": ints(-1), "far": ints(2**40)}
    onnx.save(chain(nodes, weights, {"x": (FLOAT, [3, size, 5])}, outputs), tmp_path / "g.onnx")
    session = load(tmp_path / "g.onnx").session()
    for x in fed:
        for places in session.run({"x": x}).values():
            assert 0 <= np.min(places) <= np.max(places) < size


@pytest.mark.parametrize("name", ["ConstantOfShape", "Expand", "Reshape", "Range", "Tile"])
def test_sizes_that_follow_from_pixels_are_refused(name):
    """Two places of an axis of 2^16 ask for 16 GB."""
    nodes = [node("ArgMax", "x", "n", axis=1, keepdims=0), node("ReduceMax", "n", "m", keepdims=0)]
    inputs = {"ConstantOfShape": "n", "Range": "zero m one"}.get(name, "x n")
    model = chain([*nodes, node(name, inputs, "y")], NUMBERS)
    with pytest.raises(BackendError, match=rf"\({name}\): .*constants or sizes, not computed"):
        check(model)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_token_numbers_are_checked_when_they_are_fed(tmp_path, backend):
    lookup = write_graph(
        tmp_path / "lookup.onnx",
        [node("Gather", "table token_ids", "y")],
        {"token_ids": (INT64, ["prompts", 2])},
        {"y": (FLOAT, ["prompts", 2, 3])},
        {"table": floats(5, 3)},
    )
    assert dict(check_graph(lookup).token_rows) == {"token_ids": 5}
    session = load(lookup, backend).session()
    rows = session.run({"token_ids": ints(4, 0)[None]})["y"]
    np.testing.assert_array_equal(rows[0, 0], floats(5, 3)[4])
    for token in (5, -1, 2**40):
        with refused(ArgumentError, "token_ids", str(abs(token))):
            session.run({"token_ids": ints(0, token)[None]})
    model = onnx.load(lookup)
    model.graph.input[0].type.tensor_type.elem_type = FLOAT
    with refused(BackendError, "g.onnx"):
        check(model)


# --- whole graphs ---------------------------------------------------------------------------------

NAMES = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}


@pytest.fixture
def model():
    """``image`` to ``y`` by Conv, Reshape and MatMul; weights ``w``, ``shape``, ``m``."""
    nodes = [
        node("Conv", "image w", "conv", name="conv", kernel_shape=[1, 1]),
        node("Reshape", "conv shape", "rows", name="reshape"),
        node("MatMul", "rows m", "y", name="product"),
    ]
    weights = {"w": np.ones((4, 3, 1, 1), np.float32), "shape": ints(1, 8, 8), "m": floats(8, 2)}
    return chain(nodes, weights, {"image": (FLOAT, [1, 3, 4, 4])}, {"y": (FLOAT, [1, 8, 2])})


@pytest.mark.parametrize("kind", [FLOAT, TensorProto.FLOAT16, INT64, TensorProto.UINT8])
@pytest.mark.parametrize("shape", [[], [1], ["batch", 3, "height", 2**18]], ids=str)
def test_the_interface_is_what_onnx_reads(kind, shape):
    value, dtype = (kind, shape), helper.tensor_dtype_to_np_dtype(kind).name
    header = check(chain([node("Identity", "in.put", "ü")], {}, {"in.put": value}, {"ü": value}))
    for name, (spec,) in (("in.put", header.inputs), ("ü", header.outputs)):
        assert (spec.name, spec.dtype, spec.shape) == (name, dtype, tuple(shape))


@pytest.mark.parametrize("opset", OPSETS)
def test_operators_take_what_their_schemas_say(opset):
    names = {name for name, row in OPERATORS.items() if row.inputs(opset)}
    assert names <= NAMES
    assert len(names) >= 85
    for name in names:
        schema = onnx.defs.get_schema(name, opset)
        fewest, most = OPERATORS[name].inputs(opset)
        assert not schema.deprecated
        assert all(a.type.name not in ("GRAPH", "GRAPHS") for a in schema.attributes.values())
        if (name, opset) not in {("Resize", 11), ("Resize", 12)}:  # exporters leave `roi` out
            assert fewest == schema.min_input, name
        # Dropout may not train, and Attention keeps nothing for the next token.
        limits = {"Dropout": 2, "Attention": 4}
        assert most == min(schema.max_input, limits.get(name, 1 << 16)), name
        assert OPERATORS[name].outputs[0] == schema.min_output, name
        assert OPERATORS[name].outputs[1] <= schema.max_output, name


def test_attributes_are_those_of_the_schemas():
    for name, row in OPERATORS.items():
        schemas = [onnx.defs.get_schema(name, opset) for opset in OPSETS if row.inputs(opset)]
        allowed = {attribute for schema in schemas for attribute in schema.attributes}
        needed = {a.name for schema in schemas for a in schema.attributes.values() if a.required}
        assert needed <= row.attributes <= allowed, name


@pytest.mark.parametrize("kind", [FLOAT, TensorProto.FLOAT16, INT64, TensorProto.INT8, 9, 11, 13])
@pytest.mark.parametrize("raw", [False, True])
def test_weights_may_be_raw_or_typed(model, kind, raw):
    values = np.array([0, 1, 100, 3], helper.tensor_dtype_to_np_dtype(kind))
    content = values.tobytes() if raw else values
    model.graph.initializer.append(helper.make_tensor("more", kind, [2, 2], content, raw=raw))
    assert check(model).inputs[0].name == "image"


def test_chains_of_as_many_nodes_as_may_be_are_checked_without_their_weights(tmp_path):
    """Only what describes them is looked at."""
    nodes = [node("MatMul", f"v{i} w", f"v{i + 1}") for i in range(16_000)]
    ends = {"v0": (FLOAT, [1, 4000])}, {"v16000": (FLOAT, [1, 4000])}
    weights = {"w": np.zeros((4000, 4000), np.float32)}
    path = write_graph(tmp_path / "deep.onnx", nodes, *ends, weights)
    tracemalloc.start()
    check_graph(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e7


# What is done to the model `m`, its graph `g`, its first node `conv` and its first weight `w`, and
# what the error names. add(OPERATOR, INPUTS, OUTPUT, ATTRIBUTES) adds a node called 'big'.
HOSTILE = {
    # files and what surrounds the nodes
    "w.data_location = 1; w.external_data.add(key='location', value='x/../../f')": "weight 'w'",
    "add('Constant', value=w); g.node[3].attribute[0].t.data_location = 1": "value: .* external",
    "g.sparse_initializer.add().dims.append(3)": "sparse_initializer",
    "m.training_info.add()": "training_info",
    "m.functions.add().name = 'f'": "functions",
    "m.ir_version = 99": "ir_version: .* got 99",
    "m.opset_import[0].version = 2**31": "opset_import: .* 11 to 24 .*2147483648",
    "m.opset_import[1].version = 2**31": "opset_import: expected at most 1000",
    "m.opset_import.add(domain='ai.onnx', version=21)": r"opset_import: .*\[20, 21\]",
    "del m.opset_import[:]": r"opset_import: .*\[\]",
    "g.node.extend([conv] * 20_000)": "at most 16384 nodes",
    # values and their names
    "del conv.input[:]": r"'conv' \(Conv\): expected 2 to 3 inputs, got \[\]",
    "conv.input[1] = ''": r"'conv' \(Conv\): expected 2 to 3 inputs, got \['image', None\]",
    "g.node[2].input.append('m')": r"'product' \(MatMul\): expected 2 to 2 inputs",
    "add('Relu', ['conv']); add('Relu', ['conv'], out='')": r"\(Relu\): expected 1 to 1 outputs",
    "del conv.output[:]": r"'conv' \(Conv\): expected 1 to 1 outputs, got \[\]",
    "conv.input[0] = 'rows'": r"'conv' \(Conv\): .*earlier nodes make, got 'rows'",
    "g.node[1].output[0] = 'conv'": r"'reshape' \(Reshape\): .* got 'conv'",
    "w.name = 'image'": "weights: .* got 'image'",
    "g.output[0].name = 'gone'": "graph output 'gone'",
    # operators and attributes
    "conv.domain = 'com.microsoft'": "'Conv' of domain 'com.microsoft'",
    "add('If', ['conv'])": " 20, got 'If'",
    "m.opset_import[0].version = 13; add('Gelu', ['conv'])": "set 13, got 'Gelu'",
    "m.opset_import[0].version = 11; add('Unsqueeze', ['conv'])": r"\(Unsqueeze\): axes: expected",
    "conv.attribute.add(name='body', type=5).g.name = 'inner'": r"'conv' \(Conv\): body: expected",
    "conv.attribute.add(name='group', type=2, i=1).f = 2": "group: expected a number",
    "conv.attribute.add(name='group', type=2, i=1).ref_attr_name = 'x'": "group: expected a number",
    "conv.attribute.append(conv.attribute[0])": "got kernel_shape, kernel_shape",
    # weights
    "w.raw_data = bytes(47)": "weight 'w': expected 12 values of data type 1 .* got 47 bytes",
    "w.ClearField('raw_data')": "weight 'w': expected 12 values .* got 0 bytes",
    "w.dims[0] = -4": "weight 'w': expected sizes of 0 or more",
    "w.dims[:] = [2**62, 2**62, 4]": r"weight 'w': expected \d{38} values",
    "w.dims[:] = [0, 2**62, 2**62]; w.raw_data = b''": "weight 'w': .* at most",
    "w.dims[:] = [12] + [1] * 19": "weight 'w': expected at most 16 axes, got 20",
    "w.float_data.extend([0.0] * 12)": "weight 'w': .* got raw_data, float_data",
    "w.data_type = 8": "weight 'w': .* data type 8",
    # sizes
    "g.input[0].type.tensor_type.shape.dim[2].dim_value = 2**31": "'image': .* at most 268435456",
    "g.output[0].type.tensor_type.shape.dim[0].dim_value = -1": "'y': expected sizes of 0 or more",
    "add('Constant', out='n', value_ints=[2_000_000_000]); add('ConstantOfShape', ['n'])": (
        r"\(ConstantOfShape\): .*\[2000000000\]"
    ),
}


@pytest.mark.parametrize("statement", HOSTILE)
def test_hostile_graph_is_refused(model, statement):
    def add(kind, inputs=(), out="big", **attributes):
        graph.node.append(helper.make_node(kind, inputs, [out], "big", **attributes))

    graph = model.graph
    names = {"m": model, "g": graph, "conv": graph.node[0], "w": graph.initializer[0]}
    exec(statement, names | {"add": add})
    with pytest.raises(BackendError, match=f"g.onnx: .*{HOSTILE[statement]}"):
        check(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.replace(b"rows", b"\xff\xfe\xfd\xfc"), "utf-8"),
        (lambda content: content[:-5], "truncated|damaged"),
        (lambda content: content + b"\x3a\x00", "graph given twice"),
        (lambda content: content + b"\xfa\x3f\x00", "field 1023 of wire type 2"),
        (lambda content: content + b"\x38\x01", "field 7 of wire type 0"),
        (lambda content: content + b"\x3b", "field 7 of wire type 3"),
        (lambda content: content + b"\x08" + b"\xff" * 20, "a damaged integer"),
    ],
)
def test_bytes_that_readers_take_differently_are_refused(model, damage, message):
    content = damage(model.SerializeToString())
    with pytest.raises(BackendError, match=f"g.onnx: expected an ONNX graph, got .*({message})"):
        check_graph(memoryview(content), "g.onnx")


def test_a_folder_is_no_graph(tmp_path):
    with refused(BackendError, None, tmp_path.name):
        check_graph(tmp_path)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_backends_ask_for_the_check(model, tmp_path, backend):
    del model.graph.node[0].input[:]
    onnx.save(model, tmp_path / "g.onnx")
    with refused(BackendError, None, "'conv'"):
        get_backend(backend).load(
            tmp_path / "g.onnx", device="cpu", precision="auto", options=BackendOptions()
        )
