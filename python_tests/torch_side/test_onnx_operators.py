"""Operators are judged by what they would do: indices inside their axes, shapes that fit."""

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.errors import refused
from support.graphs import write_graph
from support.operator_graphs import FLOAT, INT32, INT64, SAMPLES, Fed, floats, ints, operator_model
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.errors import ArgumentError, BackendError
from zsseg_rt.onnx.check import check_graph, check_model
from zsseg_rt.onnx.flow import Flow
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.table import OPERATORS


def check(model):
    return check_model(memoryview(model.SerializeToString()), "g.onnx")


def chain(nodes, weights, inputs=None, outputs=None):
    """A graph of several nodes from ``x`` [2, 6] to ``y``."""
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in (inputs or {"x": (FLOAT, [2, 6])}).items()
        ],
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in (outputs or {"y": (FLOAT, None)}).items()
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


# --- every operator -------------------------------------------------------------------------------


def test_every_operator_has_a_sample():
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("name", SAMPLES)
def test_sizes_are_those_of_onnx(name):
    model = operator_model(name, SAMPLES[name])
    found = Flow(read_network(model.SerializeToString())).run().values
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value in inferred.graph.output:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        if tensor.HasField("shape"):  # onnx knows most
            assert (found[value.name].dtype, found[value.name].shape) == (tensor.elem_type, shape)


# --- what is refused ------------------------------------------------------------------------------

BEYOND = {
    "Gather": [ints(0, 6), ints(-7)],
    "GatherElements": [np.array([[0, 6], [1, 2]]), np.array([[0, 0], [-7, 0]])],
    "GatherND": [np.array([[0, 6]]), np.array([[2, 0]]), np.array([[-3, 0]]), ints(2**40, 0)],
    "ScatterElements": [np.array([[0, 6], [1, 2]]), np.array([[-(2**18), 0], [1, 2]])],
    "ScatterND": [np.array([[0, 5], [-3, 2]]), np.array([[0, 2**33], [1, 2]])],
    "OneHot": [ints(0, 3, 1), ints(-4, 0, 1)],
}


@pytest.mark.parametrize(
    ("name", "indices"), [(name, each) for name, cases in BEYOND.items() for each in cases]
)
def test_index_outside_its_axis_is_refused(name, indices):
    sample = copy.deepcopy(SAMPLES[name])
    sample.inputs[name != "OneHot"] = indices
    with pytest.raises(BackendError, match=rf"node 'node' \({name}\): indices: expected const"):
        check(operator_model(name, sample))


@pytest.mark.parametrize("name", [name for name in BEYOND if name != "Gather"])
def test_fed_indices_are_refused(name):
    sample = copy.deepcopy(SAMPLES[name])
    place = int(name != "OneHot")
    sample.inputs[place] = Fed(list(sample.inputs[place].shape), INT64)
    with refused(BackendError, "g.onnx"):
        check(operator_model(name, sample))


ODD = {
    "unknown operator": ("NonZero", [Fed([1, 4, 4])], {}, "that encoders use"),
    "unknown attribute": ("Relu", [Fed([2])], {"alpha": 1.0}, "expected attributes of Relu"),
    "attribute of another type": ("Concat", [Fed([2])], {"axis": 1.0}, "got 'axis'"),
    "odd text": ("Pad", [Fed([2]), ints(0, 0)], {"mode": "wrap"}, "mode: expected one of constant"),
    "axis outside": ("Softmax", [Fed([2, 6])], {"axis": 2}, "axis: expected one of 2 axes, got 2"),
    "axis twice": ("ReduceMean", [Fed([2, 6]), ints(1, -1)], {}, "axes: expected each axis once"),
    "contradictory zeros": ("Reshape", [Fed([2, 6]), ints(0, 0, 0)], {}, "expected 0 only for"),
    "two open sizes": ("Reshape", [Fed([2, 6]), ints(-1, -1)], {}, "at most one -1"),
    "other number of elements": ("Reshape", [Fed([2, 6]), ints(5, -1)], {}, "expected one for"),
    "groups that do not divide": (
        "Conv", [Fed([1, 4, 6, 6]), floats(6, 1, 3, 3)], {"group": 3}, "channels that fit"
    ),
    "kernel beyond the image": (
        "Conv", [Fed([1, 4, 2, 6]), floats(6, 4, 3, 3)], {}, "expected at most 2 pixels, got 3"
    ),
    "stride of 0": (
        "Conv", [Fed([1, 4, 6, 6]), floats(6, 4, 3, 3)], {"strides": [0, 1]}, "1 to 65536, got .0"
    ),
    "dilation of 0": (
        "MaxPool", [Fed([1, 4, 6, 6])], {"kernel_shape": [2, 2], "dilations": [0, 1]}, "1 to 65536"
    ),
    "padding of a whole window": (
        "MaxPool", [Fed([1, 4, 6, 6])], {"kernel_shape": [2, 2], "pads": [0, 2, 0, 0]}, "pads: exp"
    ),
    "padding beyond a mirror": (
        "Pad", [Fed([2, 6]), ints(0, 6, 0, 0)], {"mode": "reflect"}, "expected 0 to 5 with mode"
    ),
    "cropped away": ("Pad", [Fed([2, 6]), ints(-2, 0, 0, 0)], {}, "expected some of size 2"),
    "split that leaves some": ("Split", [Fed([2, 6]), ints(1)], {"axis": 1}, "split: expected 1"),
    "step of 0": ("Slice", [Fed([2, 6]), ints(0), ints(1), ints(0), ints(0)], {}, "steps: exp"),
    "nothing left": ("Slice", [Fed([2, 6]), ints(5), ints(5), ints(1)], {}, "expected a result"),
    "fed nothing": ("ReduceMax", [Fed([1, 4, 0, 8]), ints(1, 2)], {}, "inputs with elements"),
    "open axis squeezed": ("Squeeze", [Fed(["n", 6]), ints(0)], {}, "axes: expected axes"),
    "tiles of an open axis": ("Tile", [Fed(["n", 6]), ints(1, 2**22)], {}, "sizes of 0 or more"),
    "more than there are": ("TopK", [Fed([2, 6]), ints(7)], {}, "k: expected 1 to 6"),
    "integers by 0": ("Div", [Fed([2], INT64), ints(0)], {}, "divisor: expected constants of 1"),
    "integers by -1": ("Div", [Fed([2], INT64), ints(-1)], {}, "divisor: expected constants of 1"),
    "integers by what is fed": ("Mod", [Fed([2], INT64), Fed([2], INT64)], {}, "divisor: expected"),
    "sizes that do not fit": ("MatMul", [Fed([2, 6]), floats(5, 3)], {}, "inner sizes"),
    "types that do not fit": ("Add", [Fed([2]), ints(1, 2)], {}, "inputs of one type"),
    "absurd scale": (
        "Resize", [Fed([1, 1, 2, 2]), None, np.array([1, 1, 1, 1e9], np.float32)], {}, "scales: ex"
    ),
    "scale to nothing": (
        "Resize", [Fed([1, 1, 2, 2]), None, np.array([1, 1, 1, 1e-9], np.float32)], {}, "1 or more"
    ),
    "scales of another axis": (
        "QuantizeLinear", [Fed([1, 4, 6, 6]), floats(3)], {}, "scale: expected one or 4 numbers"
    ),
    "letters of other sizes": (
        "Einsum", [Fed([2, 3]), Fed([2, 3])], {"equation": "ij,jk->ik"}, "sizes of j: expected"
    ),
    "repeated letter": ("Einsum", [Fed([2, 2])], {"equation": "ii->i"}, "each once, got 'ii'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_node_is_refused(case):
    name, inputs, attributes, message = ODD[case]
    sample = copy.deepcopy(SAMPLES["Relu"])
    sample.inputs, sample.attributes = inputs, attributes
    sample.results = (FLOAT, INT64) if name == "TopK" else (FLOAT,)
    with pytest.raises(BackendError, match=rf"node 'node' \({name}\): (.*){message}"):
        check(operator_model(name, sample))


@pytest.mark.parametrize("place", ["output", "value_info"])
@pytest.mark.parametrize(("kind", "shape"), [(FLOAT, [2, 7]), (FLOAT, [2]), (INT32, [2, 6])])
def test_stated_shape_that_contradicts_the_nodes_is_refused(place, kind, shape):
    model = chain(
        [helper.make_node("Relu", ["x"], ["r"], "r"), helper.make_node("Relu", ["r"], ["y"], "y")],
        {},
    )
    name = "y" if place == "output" else "r"
    del getattr(model.graph, place)[:]
    getattr(model.graph, place).append(helper.make_tensor_value_info(name, kind, shape))
    if place == "value_info":
        assert model.graph.output
    with pytest.raises(BackendError, match=rf"node '{name}' \(Relu\): {name}: expected the type"):
        check(model)


# --- what common encoders need --------------------------------------------------------------------


def node(op_type, inputs, output, **attributes):
    return helper.make_node(op_type, inputs.split(), [output], **attributes)


LARGEST = node("ArgMax", "x", "a", axis=1)  # of an axis of 6
TOP = helper.make_node("TopK", ["x", "three"], ["v", "a"], axis=1)
CAST = node("Cast", "x", "c", to=INT64)
NUMBERS = {
    name: np.array(value, np.int64)
    for name, value in {
        "zero": 0, "one": 1, "five": 5, "six": 6, "huge": 2**40, "first": [0], "second": [1],
        "three": [3], "pair": [[0, -6], [5, 1]],
    }.items()
}  # fmt: skip

BOUNDED = {
    "places of the largest": [LARGEST, node("Cast", "a", "i", to=INT32)],
    "places of the least": [node("ArgMin", "x", "a", axis=0), node("Reshape", "a three2", "i")],
    "the largest few": [TOP, node("Slice", "a first second second", "i")],
    "places and constants": [TOP, node("Concat", "a pair", "i", axis=1)],
    "constants": [node("Cast", "pair", "c", to=INT32), node("Slice", "c first second", "i")],
}
UNBOUNDED = {
    "cast from numbers": [node("Cast", "x", "i", to=INT64)],
    "one beyond the largest": [LARGEST, node("Add", "a one", "i")],
    "of a longer axis": [node("Concat", "x x", "t", axis=1), node("ArgMax", "t", "i", axis=1)],
    "constants beyond": [node("Concat", "pair seven", "i", axis=1)],
    "overflowing": [LARGEST, node("Mul", "a huge", "b"), node("Sub", "b b", "i")],
    "clipped": [CAST, node("Clip", "c zero five", "i")],
    "clipped to between nothing": [CAST, node("Clip", "c five zero", "i")],
    "clipped from below alone": [LARGEST, node("Clip", "a huge", "i")],
    "clipped constants": [node("Clip", "pair huge", "i")],
    "modulo": [LARGEST, node("Mod", "a six", "i")],
    "the lower of two": [LARGEST, node("Min", "a five", "i")],
    "chosen": [node("Equal", "x x", "e"), node("Where", "e zero five", "i")],
    "a range": [node("Range", "zero six one", "i")],
    "a size": [node("Shape", "x", "s"), node("Slice", "s first second", "i")],
    "less than a size": [node("Size", "x", "s"), node("Sub", "s six", "i")],
    "a filled list": [
        helper.make_node(
            "ConstantOfShape", ["three"], ["i"], value=numpy_helper.from_array(ints(0))
        )
    ],
    "gathered": [LARGEST, node("Gather", "a first", "i", axis=0)],
    "turned": [LARGEST, node("Transpose", "a", "i")],
}


def gather(nodes):
    """Columns of ``x`` [2, 6] picked by what other nodes compute."""
    more = {"three2": ints(2, 3), "seven": np.array([[0], [7]])}
    return chain([*nodes, node("Gather", "x i", "y", axis=1)], {**NUMBERS, **more})


@pytest.mark.parametrize("case", BOUNDED)
def test_indices_are_constants_or_places(case):
    check(gather(BOUNDED[case]))


@pytest.mark.parametrize("case", UNBOUNDED)
def test_indices_that_are_computed_are_refused(case):
    with pytest.raises(BackendError, match=r"node \d \(Gather\): indices: expected constants"):
        check(gather(UNBOUNDED[case]))


@pytest.mark.parametrize("limits", ["c zero zero", "c five zero", "c zero", "c huge"])
@pytest.mark.parametrize("name", BEYOND)
def test_no_operator_takes_clipped_indices(name, limits):
    sample, at = copy.deepcopy(SAMPLES[name]), int(name != "OneHot")
    sample.inputs[at] = Fed(list(sample.inputs[at].shape), INT64)
    graph = operator_model(name, sample)
    graph.graph.node[0].input[at] = "i"
    graph.graph.node.insert(0, node("Clip", limits.replace("c", f"i{at}"), "i"))
    weights = [numpy_helper.from_array(array, key) for key, array in NUMBERS.items()]
    graph.graph.initializer.extend(weights)
    with pytest.raises(BackendError, match=rf"'node' \({name}\): indices: .* got computed numbers"):
        check(graph)


EXTREMES = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 65])
@pytest.mark.parametrize("name", ["ArgMax", "ArgMin", "TopK"])
def test_places_are_inside_their_axis_whatever_is_fed(name, size, tmp_path):
    """So OpenVINO may take them as indices: each of its kernels, with NaN and infinities."""
    rng = np.random.default_rng(size)
    fed = [np.full((3, size, 5), value, np.float32) for value in EXTREMES]
    fed += [rng.choice(np.array(EXTREMES, np.float32), (3, size, 5)) for _ in range(4)]
    settings = [{"largest": a, "sorted": b} for a in (0, 1) for b in (0, 1)]
    if name != "TopK":
        settings = [{"select_last_index": a, "keepdims": 1} for a in (0, 1)]
    nodes, weights = [], {"k0": ints(1), "k1": ints((size + 1) // 2), "k2": ints(size)}
    for at, given in enumerate(settings):
        for k in range(3) if name == "TopK" else [0]:
            inputs, outputs = ["x"], [f"y{at}{k}"]
            if name == "TopK":
                inputs, outputs = ["x", f"k{k}"], [f"v{at}{k}", *outputs]
            nodes.append(helper.make_node(name, inputs, outputs, axis=1, **given))
    outputs = {each.output[-1]: (INT64, None) for each in nodes}
    nodes += [node("Concat", "y00 y00", "c", axis=1), node("Reshape", "c flat", "r")]
    nodes += [node("Slice", "r k0 far", "s"), node("Cast", "s", "t", to=INT32)]
    weights |= {"flat": ints(-1), "far": ints(2**40)}
    outputs["t"] = (INT32, None)
    onnx.save(chain(nodes, weights, {"x": (FLOAT, [3, size, 5])}, outputs), tmp_path / "g.onnx")
    options = BackendOptions(num_threads=1)
    graph = get_backend("openvino").load(
        tmp_path / "g.onnx", device="cpu", precision="float32", options=options
    )
    session = graph.session()
    for x in fed:
        for places in session.run({"x": x}).values():
            assert 0 <= np.min(places) <= np.max(places) < size


@pytest.mark.parametrize("name", ["ConstantOfShape", "Expand", "Reshape", "Range", "Tile"])
def test_sizes_that_follow_from_pixels_are_refused(name):
    """Two places of an axis of 2^16 ask for 16 GB."""
    nodes = [helper.make_node("ArgMax", ["x"], ["n"], axis=1, keepdims=0)]
    inputs = {"ConstantOfShape": ["n"], "Range": ["zero", "one_n", "one"]}.get(name, ["x", "n"])
    if name == "Range":
        nodes.append(helper.make_node("ReduceMax", ["n"], ["one_n"], keepdims=0))
    model = chain([*nodes, helper.make_node(name, inputs, ["y"])], NUMBERS)
    with pytest.raises(BackendError, match=rf"\({name}\): .*expected constants or sizes, got comp"):
        check(model)


def test_chains_of_as_many_nodes_as_may_be_are_checked():
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(16_000)]
    nodes.append(helper.make_node("Relu", ["v16000"], ["y"]))
    check(chain(nodes, {}, {"v0": (FLOAT, [2])}))


# --- token numbers --------------------------------------------------------------------------------


@pytest.fixture
def lookup(tmp_path):
    return write_graph(
        tmp_path / "lookup.onnx",
        [helper.make_node("Gather", ["table", "token_ids"], ["y"])],
        {"token_ids": (INT64, ["prompts", 2])},
        {"y": (FLOAT, ["prompts", 2, 3])},
        {"table": floats(5, 3)},
    )


def test_token_numbers_are_left_to_whoever_feeds_them(lookup):
    assert dict(check_graph(lookup).token_rows) == {"token_ids": 5}


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_token_numbers_are_checked_when_they_are_fed(lookup, backend):
    options = BackendOptions(num_threads=1)
    graph = get_backend(backend).load(lookup, device="cpu", precision="float32", options=options)
    session = graph.session()
    np.testing.assert_array_equal(
        session.run({"token_ids": ints(4, 0)[None]})["y"][0, 0], floats(5, 3)[4]
    )
    for token in (5, -1, 2**40):
        with refused(ArgumentError, "token_ids", str(abs(token))):
            session.run({"token_ids": ints(0, token)[None]})


def test_token_types(lookup):
    model = onnx.load(lookup)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with refused(BackendError, "g.onnx"):
        check(model)
