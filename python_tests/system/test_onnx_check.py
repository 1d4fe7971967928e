"""No graph reaches a backend that could end the process, fill its memory or read another file."""

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.errors import refused
from support.graphs import write_graph
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.reader import OPSETS
from zsseg_rt.onnx.table import OPERATORS

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
NAMES = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}


def check(model):
    return check_graph(memoryview(model.SerializeToString()), "g.onnx")


@pytest.fixture
def model(tmp_path):
    """``image`` to ``y`` by Conv, Reshape and MatMul; weights ``w``, ``shape``, ``m``."""
    path = write_graph(
        tmp_path / "g.onnx",
        [
            helper.make_node("Conv", ["image", "w"], ["conv"], "conv", kernel_shape=[1, 1]),
            helper.make_node("Reshape", ["conv", "shape"], ["rows"], "reshape"),
            helper.make_node("MatMul", ["rows", "m"], ["y"], "product"),
        ],
        {"image": (FLOAT, [1, 3, 4, 4])},
        {"y": (FLOAT, [1, 8, 2])},
        {
            "w": np.ones((4, 3, 1, 1), np.float32),
            "shape": np.array([1, 8, 8], np.int64),
            "m": np.ones((8, 2), np.float32),
        },
    )
    return onnx.load(path)


@pytest.mark.parametrize("kind", [FLOAT, TensorProto.FLOAT16, INT64, TensorProto.UINT8])
@pytest.mark.parametrize("shape", [[], [1], ["batch", 3, "height", 2**18]], ids=str)
def test_the_interface_is_what_onnx_reads(tmp_path, kind, shape):
    node, value = helper.make_node("Identity", ["in.put"], ["\u00fc"]), (kind, shape)
    header = check_graph(
        write_graph(tmp_path / "g.onnx", [node], {"in.put": value}, {"\u00fc": value})
    )
    dtype = helper.tensor_dtype_to_np_dtype(kind).name
    for name, (spec,) in (("in.put", header.inputs), ("\u00fc", header.outputs)):
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
    nodes = [helper.make_node("MatMul", [f"v{i}", "w"], [f"v{i + 1}"]) for i in range(16_000)]
    ends = {"v0": (FLOAT, [1, 4000])}, {"v16000": (FLOAT, [1, 4000])}
    weights = {"w": np.zeros((4000, 4000), np.float32)}
    path = write_graph(tmp_path / "deep.onnx", nodes, *ends, weights)
    tracemalloc.start()
    check_graph(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e7


# What is done to the model `m`, its graph `g`, its first node `conv` and its first weight `w`, and
# what the error names. add(OPERATOR, INPUTS, CONSTANTS, ATTRIBUTES) adds a node called 'big'.
HOSTILE = {
    # files and what surrounds the nodes
    "w.data_location = 1; w.external_data.add(key='location', value='x/../../f')": "weight 'w'",
    "add('Constant', value=outside())": r"\(Constant\): value: .* external data",
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
    "add('Max', ['conv', ''])": r"'big' \(Max\): .* inputs, got \['conv', None\]",
    "add('Relu', ['conv']); add('Relu', ['conv'], out='')": r"\(Relu\): expected 1 to 1 outputs",
    "del conv.output[:]": r"'conv' \(Conv\): expected 1 to 1 outputs, got \[\]",
    "conv.input[0] = 'rows'": r"'conv' \(Conv\): .*earlier nodes make, got 'rows'",
    "g.node[1].output[0] = 'conv'": r"'reshape' \(Reshape\): .* got 'conv'",
    "w.name = 'image'": "weights: .* got 'image'",
    "g.output[0].name = 'gone'": "graph output 'gone'",
    # operators and attributes
    "conv.domain = 'com.microsoft'": "'Conv' of domain 'com.microsoft'",
    "add('RandomNormalLike', ['conv'])": " 20, got 'RandomNormalLike'",
    "add('If', ['conv'])": " 20, got 'If'",
    "m.opset_import[0].version = 13; add('Gelu', ['conv'])": "set 13, got 'Gelu'",
    "m.opset_import[0].version = 11; add('Unsqueeze', ['conv'])": r"\(Unsqueeze\): axes: expected",
    "add('DepthToSpace', ['conv'])": r"\(DepthToSpace\): blocksize: expected",
    "conv.attribute.add(name='body', type=5).g.name = 'inner'": r"'conv' \(Conv\): body: expected",
    "conv.attribute.add(name='group', type=2, i=1).f = 2": "group: expected a number",
    "conv.attribute.add(name='group', type=2, i=1).ref_attr_name = 'x'": "group: expected a number",
    "conv.attribute.append(conv.attribute[0])": "got kernel_shape, kernel_shape",
    "add('MaxPool', ['conv'], kernel_shape=[3, 0])": r"kernel_shape: .* got \[3, 0\]",
    "add('MaxPool', ['conv'], kernel_shape=[3, 3], pads=[2**20] * 4)": r"\(MaxPool\): pads: exp",
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
    "add('ConstantOfShape', n=[2_000_000_000])": r"\(ConstantOfShape\): .*\[2000000000\]",
    "add('ConstantOfShape', n=[-1])": r"\(ConstantOfShape\): expected sizes .*\[-1\]",
    "node('Constant', [], ['n'], value_ints=[2_000_000_000]); add('ConstantOfShape', ['n'])": (
        r"\(ConstantOfShape\): .*\[2000000000\]"
    ),
    "typed('n', 2_000_000_000); add('ConstantOfShape', ['n'])": "ConstantOfShape.*2000000000",
    "add('Expand', ['m'], n=[100_000, 2000, 8, 2])": r"'big' \(Expand\): expected sizes",
    "add('Tile', ['m'], n=[2**14, 2**12])": r"'big' \(Tile\): expected sizes",
    "add('Resize', ['conv', ''], n=[1, 1, 2, float('inf')])": r"'big' \(Resize\): scales: expected",
    "add('Resize', ['conv', '', ''], n=[1, 4, 2**20, 2**20])": r"'big' \(Resize\): expected sizes",
    "add('Range', a=0, b=2**40, c=1)": r"'big' \(Range\): expected sizes",
    "add('Range', a=0, b=5, c=0)": r"'big' \(Range\): expected finite numbers and a step",
    "add('Pad', ['conv'], n=[0, 0, 2**15, 2**15] * 2)": r"'big' \(Pad\): expected sizes",
}


def change(model, statement):
    graph = model.graph

    def node(kind, inputs, outputs, **attributes):
        graph.node.append(helper.make_node(kind, inputs, outputs, "big", **attributes))

    def add(kind, inputs=(), out="big", **attributes):
        constants = {name: attributes.pop(name) for name in "nabc" if name in attributes}
        for name, values in constants.items():
            array = np.array(values, np.float32 if float("inf") in np.ravel(values) else np.int64)
            graph.initializer.append(numpy_helper.from_array(array, name))
        node(kind, [*inputs, *constants], [out], **attributes)

    def outside():
        tensor = numpy_helper.from_array(np.ones(2))
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value="f")
        return tensor

    def typed(name, value):
        graph.initializer.append(helper.make_tensor(name, INT64, [1], [value]))

    names = {"m": model, "g": graph, "conv": graph.node[0], "w": graph.initializer[0]}
    helpers = {"node": node, "add": add, "outside": outside, "typed": typed}
    exec(statement, names | helpers)


@pytest.mark.parametrize("statement", HOSTILE)
def test_hostile_graph_is_refused(model, statement):
    change(model, statement)
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
