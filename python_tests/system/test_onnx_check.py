"""No graph reaches a backend that could end the process, fill its memory or read another file."""

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.errors import refused
from support.graphs import write_graph
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.check import check_graph, check_model
from zsseg_rt.onnx.reader import OPSETS
from zsseg_rt.onnx.table import OPERATORS

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BUNDLES = Path(__file__).parents[1] / "bundles/v1"
NAMES = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
GRAPHS = sorted(BUNDLES.glob("*/*.onnx"))


def check(model):
    return check_model(memoryview(model.SerializeToString()), "g.onnx")


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


# --- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_every_stored_graph_passes(path):
    header, graph = check_graph(path), onnx.load(path).graph
    assert [spec.name for spec in header.inputs] == [value.name for value in graph.input]
    assert [spec.name for spec in header.outputs] == [value.name for value in graph.output]


@pytest.mark.parametrize("opset", OPSETS)
def test_operators_take_what_their_schemas_say(opset):
    known = {name for name, row in OPERATORS.items() if row.inputs(opset)}
    assert known <= NAMES
    assert len(known) >= 85
    for name in known:
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
        known = {attribute for schema in schemas for attribute in schema.attributes}
        needed = {a.name for schema in schemas for a in schema.attributes.values() if a.required}
        assert needed <= row.attributes <= known, name


def test_only_operators_without_chance_and_text_are_known():
    words = ("Random", "Sequence", "Optional", "String", "Multinomial", "Bernoulli", "ImageDecoder")
    for schema in onnx.defs.get_all_schemas():
        if any(word in schema.name for word in words) or schema.name in ("If", "Loop", "Scan"):
            assert schema.name not in OPERATORS


@pytest.mark.parametrize("kind", [FLOAT, TensorProto.FLOAT16, INT64, TensorProto.INT8, 9, 11, 13])
@pytest.mark.parametrize("raw", [False, True])
def test_weights_may_be_raw_or_typed(model, kind, raw):
    values = np.array([0, 1, 100, 3], helper.tensor_dtype_to_np_dtype(kind))
    content = values.tobytes() if raw else values
    model.graph.initializer.append(helper.make_tensor("more", kind, [2, 2], content, raw=raw))
    assert check(model).inputs[0].name == "image"


def test_optional_inputs_may_be_left_out(model):
    model.graph.node.append(helper.make_node("Resize", ["conv", "", "", "four"], ["big"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4, 8, 8]), "four"))
    check(model)


def test_checking_does_not_read_the_weights(tmp_path):
    """1500 nodes with weights of 64 MB: only what describes them is looked at."""
    nodes = [helper.make_node("MatMul", [f"v{i}", "w"], [f"v{i + 1}"]) for i in range(1500)]
    path = write_graph(
        tmp_path / "deep.onnx",
        nodes,
        {"v0": (FLOAT, [1, 4000])},
        {"v1500": (FLOAT, [1, 4000])},
        {"w": np.zeros((4000, 4000), np.float32)},
    )
    tracemalloc.start()
    check_graph(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


# --- what is refused ----------------------------------------------------------------------------

HOSTILE = {}


def hostile(message):
    def add(change):
        HOSTILE[change.__name__] = (change, message)
        return change

    return add


@hostile(r"weight 'w': expected its values in the file, got external data")
def external_data(model):
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="x/../../f")


@hostile(r"node 'c' \(Constant\): value: expected its values in the file, got external data")
def external_constant(model):
    node = helper.make_node("Constant", [], ["c"], "c", value=numpy_helper.from_array(np.ones(2)))
    node.attribute[0].t.ClearField("raw_data")
    node.attribute[0].t.external_data.add(key="location", value="f")
    model.graph.node.append(node)


@hostile("graph: expected only nodes and weights, got sparse_initializer")
def sparse_weight(model):
    model.graph.sparse_initializer.add().dims.append(3)


@hostile("graph: expected only nodes and weights, got training_info")
def training(model):
    model.training_info.add()


@hostile("graph: expected only nodes and weights, got functions")
def functions(model):
    model.functions.add().name = "f"


@hostile(r"node 'conv' \(Conv\): expected 2 to 3 inputs, got \[\]")
def conv_without_inputs(model):
    del model.graph.node[0].input[:]


@hostile(r"node 'conv' \(Conv\): expected 2 to 3 inputs, got \['image', None\]")
def conv_without_weight(model):
    model.graph.node[0].input[1] = ""


@hostile(r"node 'product' \(MatMul\): expected 2 to 2 inputs")
def one_input_too_many(model):
    model.graph.node[2].input.append("m")


@hostile(r"node 'again' \(Relu\): expected 1 to 1 outputs, got \[None\]")
def no_name_for_what_an_equal_node_makes(model):
    for name, made in (("first", "r"), ("again", "")):
        model.graph.node.append(helper.make_node("Relu", ["conv"], [made], name))


@hostile(r"node 'conv' \(Conv\): expected 1 to 1 outputs, got \[\]")
def no_output(model):
    del model.graph.node[0].output[:]


@hostile(r"node 'conv' \(Conv\): expected inputs that earlier nodes make, got 'rows'")
def later_value(model):
    model.graph.node[0].input[0] = "rows"


@hostile(r"node 'reshape' \(Reshape\): expected a new name for each value, got 'conv'")
def value_made_twice(model):
    model.graph.node[1].output[0] = "conv"


@hostile("weights: expected a new name for each value, got 'image'")
def weight_called_like_an_input(model):
    model.graph.initializer[0].name = "image"


@hostile("graph output 'gone': expected a value of the graph")
def output_never_made(model):
    model.graph.output[0].name = "gone"


@hostile("opset_import: expected one version of 11 to 24 for the standard operators, got .*214748")
def opset_of_two_thousand_million(model):
    model.opset_import[0].version = 2**31


@hostile("opset_import: expected at most 1000")
def foreign_opset_of_two_thousand_million(model):
    model.opset_import[1].version = 2**31


@hostile(r"opset_import: expected one version .*, got \[20, 21\]")
def two_opsets(model):
    model.opset_import.add(domain="ai.onnx", version=21)


@hostile(r"opset_import: expected one version .*, got \[\]")
def no_opset(model):
    del model.opset_import[:]


@hostile("ir_version: expected 4 to 14, got 99")
def newer_format(model):
    model.ir_version = 99


@hostile("expected an operator that encoders use.* got 'Conv' of domain 'com.microsoft'")
def foreign_domain(model):
    model.graph.node[0].domain = "com.microsoft"


@hostile("expected an operator that encoders use, .* 20, got 'RandomNormalLike'")
def chance(model):
    model.graph.node.append(helper.make_node("RandomNormalLike", ["conv"], ["r"]))


@hostile("expected an operator that encoders use, .* 20, got 'If'")
def control_flow(model):
    model.graph.node.append(helper.make_node("If", ["conv"], ["r"]))


@hostile(r"expected an operator that encoders use, in the standard operator set 13, got 'Gelu'")
def operator_of_a_later_set(model):
    model.opset_import[0].version = 13
    model.graph.node.append(helper.make_node("Gelu", ["conv"], ["g"]))


@hostile(r"node 'conv' \(Conv\): body: expected a number, text or tensor")
def subgraph(model):
    model.graph.node[0].attribute.add(name="body", type=5).g.name = "inner"


@hostile(r"group: expected a number, text or tensor of its type")
def attribute_of_two_types(model):
    model.graph.node[0].attribute.add(name="group", type=2, i=1).f = 2


@hostile(r"group: expected a number, text or tensor of its type")
def attribute_by_reference(model):
    model.graph.node[0].attribute.add(name="group", type=2, i=1).ref_attr_name = "x"


@hostile(r"node 'conv' \(Conv\): expected each attribute once, got kernel_shape, kernel_shape")
def attribute_twice(model):
    model.graph.node[0].attribute.append(model.graph.node[0].attribute[0])


@hostile(r"weight 'w': expected 12 values of data type 1 .* got 47 bytes of raw_data")
def short_weight(model):
    model.graph.initializer[0].raw_data = bytes(47)


@hostile(r"weight 'w': expected 12 values .* got 0 bytes")
def absent_weight(model):
    model.graph.initializer[0].ClearField("raw_data")


@hostile(r"weight 'w': expected sizes of 0 or more")
def negative_size(model):
    model.graph.initializer[0].dims[0] = -4


@hostile(r"weight 'w': expected \d{38} values")
def overflowing_sizes(model):
    model.graph.initializer[0].dims[:] = [2**62, 2**62, 4]


@hostile(r"weight 'w': expected sizes of 0 or more for at most")
def huge_sizes_of_nothing(model):
    model.graph.initializer[0].dims[:] = [0, 2**62, 2**62]
    model.graph.initializer[0].raw_data = b""


@hostile(r"weight 'w': expected at most 16 axes, got 20")
def many_axes(model):
    model.graph.initializer[0].dims[:] = [12] + [1] * 19


@hostile(r"weight 'w': expected one kind of data, got raw_data, float_data")
def data_twice(model):
    model.graph.initializer[0].float_data.extend([0.0] * 12)


@hostile(r"weight 'w': expected numbers, got data type 8")
def text_weight(model):
    model.graph.initializer[0].data_type = TensorProto.STRING


@hostile(r"tensor 'image': expected sizes of 0 or more for at most 268435456 elements")
def huge_input(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**31


@hostile(r"tensor 'y': expected sizes of 0 or more")
def negative_output(model):
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1


def add_node(model, op_type, inputs, constants, **attributes):
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    model.graph.node.append(helper.make_node(op_type, inputs, ["big"], "big", **attributes))


@hostile(r"node 'big' \(ConstantOfShape\): expected sizes .* got \[2000000000\]")
def constant_of_two_thousand_million(model):
    add_node(model, "ConstantOfShape", ["n"], {"n": [2_000_000_000]})


@hostile(r"node 'big' \(ConstantOfShape\): expected sizes .* got \[-1\]")
def constant_of_negative_size(model):
    add_node(model, "ConstantOfShape", ["n"], {"n": [-1]})


@hostile(r"node 'big' \(ConstantOfShape\): expected sizes .* got \[2000000000\]")
def constant_sized_by_a_node(model):
    model.graph.node.append(helper.make_node("Constant", [], ["n"], value_ints=[2_000_000_000]))
    add_node(model, "ConstantOfShape", ["n"], {})


@hostile(r"node 'big' \(ConstantOfShape\): expected sizes .* got \[2000000000\]")
def constant_sized_by_typed_data(model):
    model.graph.initializer.append(helper.make_tensor("n", INT64, [1], [2_000_000_000]))
    add_node(model, "ConstantOfShape", ["n"], {})


@hostile(r"node 'big' \(Expand\): expected sizes")
def huge_expand(model):
    add_node(model, "Expand", ["m", "n"], {"n": [100_000, 2000, 8, 2]})


@hostile(r"node 'big' \(Tile\): expected sizes")
def huge_tile(model):
    add_node(model, "Tile", ["m", "n"], {"n": [2**14, 2**12]})


@hostile(r"node 'big' \(Resize\): scales: expected 4 numbers up to 65536, got .* inf")
def infinite_resize(model):
    scales = np.array([1, 1, 2, np.inf], np.float32)
    add_node(model, "Resize", ["conv", "", "n"], {"n": scales})


@hostile(r"node 'big' \(Resize\): expected sizes")
def huge_resize(model):
    add_node(model, "Resize", ["conv", "", "", "n"], {"n": [1, 4, 2**20, 2**20]})


@hostile(r"node 'big' \(Range\): expected sizes")
def huge_range(model):
    add_node(model, "Range", ["a", "b", "c"], {"a": 0, "b": 2**40, "c": 1})


@hostile(r"node 'big' \(Range\): expected finite numbers and a step")
def range_without_a_step(model):
    add_node(model, "Range", ["a", "b", "c"], {"a": 0, "b": 5, "c": 0})


@hostile(r"node 'big' \(Pad\): expected sizes")
def huge_pad(model):
    add_node(model, "Pad", ["conv", "n"], {"n": [0, 0, 2**15, 2**15, 0, 0, 2**15, 2**15]})


@hostile(r"node 'big' \(MaxPool\): kernel_shape: expected 1 to 65536, got \[3, 0\]")
def empty_kernel(model):
    add_node(model, "MaxPool", ["conv"], {}, kernel_shape=[3, 0])


@hostile(r"node 'big' \(MaxPool\): pads: expected sizes")
def huge_attribute(model):
    add_node(model, "MaxPool", ["conv"], {}, kernel_shape=[3, 3], pads=[2**20] * 4)


@hostile("expected inputs, outputs and at most 16384 nodes")
def many_nodes(model):
    node = helper.make_node("Relu", ["conv"], ["r"])
    model.graph.node.extend([node] * 20_000)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph_is_refused(model, name):
    change, message = HOSTILE[name]
    change(model)
    with pytest.raises(BackendError, match=f"g.onnx: .*{message}"):
        check(model)


DAMAGED = {
    "not UTF-8": (lambda content: content.replace(b"rows", b"\xff\xfe\xfd\xfc"), "utf-8"),
    "cut": (lambda content: content[:-5], "truncated|damaged"),
    "graph given twice": (lambda content: content + b"\x3a\x00", "graph given twice"),
    "unknown field": (lambda content: content + b"\xfa\x3f\x00", "field 1023 of wire type 2"),
    "graph of another wire type": (lambda content: content + b"\x38\x01", "field 7 of wire type 0"),
    "group": (lambda content: content + b"\x3b", "field 7 of wire type 3"),
    "endless integer": (lambda content: content + b"\x08" + b"\xff" * 20, "a damaged integer"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_bytes_that_readers_take_differently_are_refused(model, name):
    damage, message = DAMAGED[name]
    content = damage(model.SerializeToString())
    with pytest.raises(BackendError, match=f"g.onnx: expected an ONNX graph, got .*({message})"):
        check_model(memoryview(content), "g.onnx")


def refusal(content):
    """The message of the BackendError, None without one."""
    try:
        check_model(memoryview(content), "g.onnx")
    except BackendError as error:
        return str(error)
    return None


def damaged_copies(content, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        cut = rng.integers(1, len(content)) if rng.random() < 0.2 else len(content)
        damaged = bytearray(content[:cut])
        for index in rng.integers(0, cut, rng.integers(1, 4)):
            damaged[index] ^= 1 << rng.integers(0, 8)
        yield bytes(damaged)


def test_damaged_bytes_pass_or_give_a_backend_error(model):
    found = [refusal(content) for content in damaged_copies(model.SerializeToString(), 300)]
    assert None in found
    assert all(message.startswith("g.onnx: ") for message in found if message)


# --- end to end: in a child process, which a backend could end -----------------------------------

RUN = """
import resource, sys
from pathlib import Path
import numpy as np
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ZssegError
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for path in sys.argv[1:]:
    try:
        with Engine(path, EngineConfig(device="cpu", use_cache=False)) as engine:
            engine.set_classes(list(engine.bundle.text_bank.names)[:3])
            engine.segment(np.zeros((32, 32, 3), np.uint8))
        print("ran")
    except ZssegError as error:
        print(type(error).__name__, repr(str(error)))
"""


def run_bundles(*paths):
    """What each bundle gave: "ran", or the error."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def forge(family, folder, change):
    """A copy of a stored bundle with another graph, whose hash is right."""
    path = shutil.copytree(BUNDLES / f"{family}.zsseg", folder)
    manifest = json.loads((path / "bundle.json").read_text())
    entry = manifest["graphs"]["image_encoder"]["float32"]
    graph = path / entry["file"]
    graph.write_bytes(change(graph.read_bytes(), path))
    entry["sha256"] = hashlib.sha256(graph.read_bytes()).hexdigest()
    entry["bytes"] = graph.stat().st_size
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def changed(change):
    def forged(content, folder):
        model = onnx.load_from_string(content)
        change(model, folder)
        return model.SerializeToString()

    return forged


def conv_loses_its_inputs(model, folder):
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    del conv.input[:]


def weight_moves_into_a_file(model, folder):
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def test_forged_bundles_are_refused_when_they_are_opened(tmp_path):
    def opset(model, folder):
        model.opset_import[0].version = 2**31

    def huge(model, folder):
        constant_of_two_thousand_million(model)

    changes = (conv_loses_its_inputs, weight_moves_into_a_file, opset, huge)
    paths = [
        forge("proposals", tmp_path / f"{change.__name__}.zsseg", changed(change))
        for change in changes
    ]
    messages = ("(Conv): expected 2 to 3 inputs", "got external data", "opset_import", "2000000000")
    found = run_bundles(*paths, BUNDLES / "proposals.zsseg")
    assert found.pop() == "ran"
    for line, message in zip(found, messages, strict=True):
        assert line.startswith("BackendError")
        assert message in line


def test_damaged_graphs_run_or_are_refused(tmp_path):
    content = (BUNDLES / "descriptor.zsseg/image_encoder.float32.onnx").read_bytes()
    passing = [copy for copy in damaged_copies(content, 60) if refusal(copy) is None][:12]
    assert passing
    paths = [
        forge("descriptor", tmp_path / f"{index}.zsseg", lambda *_, copy=copy: copy)
        for index, copy in enumerate(passing)
    ]
    found = run_bundles(*paths)
    assert len(found) == len(paths)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_backends_ask_for_the_check(model, tmp_path, backend):
    conv_without_inputs(model)
    onnx.save(model, tmp_path / "g.onnx")
    with refused(BackendError, None, "'conv'"):
        get_backend(backend).load(
            tmp_path / "g.onnx", device="cpu", precision="auto", options=BackendOptions()
        )
