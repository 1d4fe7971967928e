"""Every operator of the table computes what ONNX says, in NumPy and in torch."""

import copy

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from support.operator_graphs import FLOAT, SAMPLES, Fed, Sample, floats, ints, operator_model
from zsseg_rt.onnx.arrays import NUMPY, compute
from zsseg_rt.onnx.on_torch import OnTorch
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.table import OPERATORS, newest

torch = pytest.importorskip("torch")

LIBRARIES = {"numpy": NUMPY, "torch": OnTorch(torch)}
RUNNING = [name for name in SAMPLES if OPERATORS[name].run is not None]
POSITIVE = ("Log", "Sqrt", "Pow", "ReduceLogSum")
IMAGE = [2, 3, 9, 7]


def results(model, feeds, library):
    """What the table makes of a graph of one node."""
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
    found = compute(node.kind, inputs, node.attributes, LIBRARIES[library])
    return found if isinstance(found, tuple) else (found,)


def feeds_of(model, rng, positive=False):
    feeds = {}
    for spec in read_network(model.SerializeToString()).inputs:
        values = rng.standard_normal(spec.shape) * 3
        values = np.abs(values) + 0.1 if positive else values
        feeds[spec.name] = values > 0 if spec.dtype == "bool" else values.astype(spec.dtype)
    return feeds


def assert_equal(found, expected, tolerance=2e-5):
    for actual, wanted in zip(found, expected, strict=True):
        actual, wanted = np.asarray(actual), np.asarray(wanted)
        assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), np.asarray(wanted, np.float64),
            atol=tolerance, rtol=tolerance,
        )  # fmt: skip


def test_most_operators_run():
    left = set(OPERATORS) - set(RUNNING)
    assert left == {
        "DequantizeLinear", "LRN", "OneHot", "QuantizeLinear", "ScatterElements", "ScatterND"
    }  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", RUNNING)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_operator_equals_the_reference(name, library, seed):
    model = operator_model(name, SAMPLES[name])
    feeds = feeds_of(model, np.random.default_rng(seed), positive=name in POSITIVE)
    assert_equal(results(model, feeds, library), ReferenceEvaluator(model).run(None, feeds))


def shaped(draw, name):
    """A sample with drawn sizes and attributes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    sample = Sample([Fed(shape)])
    axes = ints(*draw(st.sets(st.sampled_from(range(len(shape))), min_size=1)))
    if name.startswith("Reduce"):
        sample.inputs.append(axes)
        sample.attributes["keepdims"] = draw(st.integers(0, 1))
    elif name in ("Softmax", "LogSoftmax", "Concat"):
        sample.attributes["axis"] = axis
        sample.inputs *= 1 if name != "Concat" else draw(st.integers(1, 3))
    elif name == "Transpose":
        sample.attributes["perm"] = draw(st.permutations(range(len(shape))))
    elif name == "Unsqueeze":
        sample.inputs.append(ints(*(axes % (len(shape) + len(axes)))))
    elif name in ("Add", "Mul", "Max"):
        other = [draw(st.sampled_from((1, size))) for size in shape]
        sample.inputs.append(floats(*other[draw(st.integers(0, len(shape) - 1)) :]))
    elif name == "Gather":
        count = shape[axis]
        places = draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=5))
        sample.inputs.append(ints(*places))
        sample.attributes["axis"] = axis
    elif name == "Slice":
        start, end = (draw(st.integers(-6, 6)) for _ in range(2))
        step = draw(st.sampled_from((-2, -1, 1, 2)))
        sample.inputs += [ints(start), ints(end), ints(axis), ints(step)]
    elif name == "Tile":
        sample.inputs.append(ints(*[draw(st.integers(1, 3)) for _ in shape]))
    elif name == "Pad":
        pads = [draw(st.integers(0, size - 1)) for size in shape * 2]
        sample.inputs.append(ints(*pads))
        sample.attributes["mode"] = draw(st.sampled_from(("constant", "reflect", "edge")))
    elif name == "TopK":
        sample.inputs.append(ints(draw(st.integers(1, shape[axis]))))
        sample.attributes |= {"axis": axis, "largest": draw(st.integers(0, 1))}
        sample.results = (FLOAT, 7)
    return sample


@pytest.mark.parametrize("name", ["Add", "Concat", "Gather", "Max", "Mul", "Pad", "ReduceL2",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceProd", "ReduceSum", "Slice", "Softmax",
    "LogSoftmax", "Tile", "TopK", "Transpose", "Unsqueeze"])  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_sizes_and_attributes(name, data):
    model = operator_model(name, shaped(data.draw, name))
    feeds = feeds_of(model, np.random.default_rng(data.draw(st.integers(0, 99))))
    expected = ReferenceEvaluator(model).run(None, feeds)
    for library in LIBRARIES:
        assert_equal(results(model, feeds, library), expected)


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


def window_cases():
    for attributes in [*POOLS, {"kernel_shape": [2, 2], "dilations": [2, 3]}]:
        yield "MaxPool", [], attributes
    for attributes in POOLS:
        for include in (0, 1):
            yield "AveragePool", [], {**attributes, "count_include_pad": include}
    for attributes in ({}, {"strides": [2, 2], "pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_LOWER"}):
        yield "Conv", [floats(4, 3, 3, 2), floats(4)], attributes
    yield "Conv", [floats(6, 1, 3, 3)], {"group": 3, "dilations": [2, 1]}
    for attributes in (
        {},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [4, 3]},
        {"strides": [2, 3], "output_padding": [1, 2], "dilations": [2, 1]},
    ):
        yield "ConvTranspose", [floats(3, 2, 4, 3), floats(2)], attributes
    for rule in RESIZES:
        for size in ((18, 14), (13, 20), (4, 5)):
            yield "Resize", [None, None, ints(2, 3, *size)], rule
        yield "Resize", [None, np.array([1, 1, 1.5, 2.25], np.float32)], rule
    for columns in ([9, 5], [5, 9]):
        turned = {"transB": int(columns == [5, 9]), "alpha": 0.5, "beta": 3.0}
        yield "Gemm", [floats(*columns), floats(5)], turned


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "inputs", "attributes"), list(window_cases()))
def test_windows_and_sizes_are_those_of_onnxruntime(name, inputs, attributes, library):
    image = [7, 9] if name == "Gemm" else IMAGE
    sample = Sample([Fed(image), *copy.deepcopy(inputs)], attributes)
    model = operator_model(name, sample)
    feeds = feeds_of(model, np.random.default_rng(0))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert_equal(results(model, feeds, library), session.run(None, feeds))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_older_softmax_takes_all_axes_behind(name, library):
    model = operator_model(name, Sample([Fed([2, 3, 4])], {}, opset=11))
    feeds = feeds_of(model, np.random.default_rng(0))
    expected = ReferenceEvaluator(operator_model(name, Sample([Fed([2, 12])], {"axis": 1}))).run(
        None, {"i0": feeds["i0"].reshape(2, 12)}
    )
    assert_equal(results(model, feeds, library), [expected[0].reshape(2, 3, 4)])


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_index_of_the_host_outside_its_axis_is_refused(library):
    x = np.zeros((2, 3), np.float32)
    x = torch.from_numpy(x) if library == "torch" else x
    with pytest.raises(IndexError, match="expected indices from -2 to 1"):
        compute("Gather", (x, ints(2)), {}, LIBRARIES[library])
