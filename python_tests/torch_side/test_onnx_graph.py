"""The interface agrees with onnx, and damaged bytes make the check fail in one way alone."""

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from support.errors import refused
from support.graphs import write_graph, write_two_inputs
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.check import check_graph


def specs_by_onnx(values):
    for value in values:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        yield value.name, dtype, shape


KINDS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.UINT8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [[], [1], ["batch", 3, "height", 2**18]], ids=str)
def test_matches_onnx(tmp_path, kind, shape):
    path = write_graph(
        tmp_path / "g.onnx",
        [helper.make_node("Identity", ["in.put"], ["\u00fc"])],
        {"in.put": (kind, shape)},
        {"\u00fc": (kind, shape)},
    )
    header, graph = check_graph(path), onnx.load(path).graph
    for found, values in ((header.inputs, graph.input), (header.outputs, graph.output)):
        assert [(s.name, s.dtype, s.shape) for s in found] == list(specs_by_onnx(values))


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write_two_inputs(tmp_path_factory.mktemp("graphs") / "two.onnx").read_bytes()


def outcome(path):
    """The message of the BackendError, None without one."""
    try:
        check_graph(path)
    except BackendError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_give_a_backend_error_or_a_header(tmp_path_factory, content, data):
    damaged = bytearray(content[: data.draw(st.integers(1, len(content)))])
    for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[index] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(damaged)
    assert outcome(path) is None or outcome(path).startswith(f"{path}: ")


def test_folder_instead_of_a_file(tmp_path):
    with refused(BackendError, None, tmp_path.name):
        check_graph(tmp_path)
