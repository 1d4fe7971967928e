"""Decode an ONNX file without the onnx package: nodes, attributes, and where the weights are.

Weights stay views of the file, so a graph of any size costs milliseconds. Field numbers are those
of ``onnx.proto`` (ONNX IR). What a graph may hold is up to ``check``; the decoder refuses only what
can be read in more than one way: readers of protobuf disagree about odd bytes, and a file that one
reader checks and another runs must not hold any.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec

# Kinds of fields. Bytes stay a view of the file: nested messages and weights cost nothing.
INT, FLOAT, TEXT, BYTES = "INT", "FLOAT", "TEXT", "BYTES"
MANY_INTS, MANY_FLOATS = "MANY_INTS", "MANY_FLOATS"
MANY_TEXTS, MANY_BYTES = "MANY_TEXTS", "MANY_BYTES"

Schema = Mapping[int, tuple[str, str]]
"""Field number -> (name, kind)."""

_REPEATED = (MANY_INTS, MANY_FLOATS, MANY_TEXTS, MANY_BYTES)
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
_WIRE_TYPES = {
    INT: (_VARINT,),
    FLOAT: (_FOUR_BYTES,),
    TEXT: (_SIZED,),
    BYTES: (_SIZED,),
    MANY_INTS: (_VARINT, _SIZED),  # one by one, or packed
    MANY_FLOATS: (_FOUR_BYTES, _SIZED),
    MANY_TEXTS: (_SIZED,),
    MANY_BYTES: (_SIZED,),
}
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}
_MODEL: Schema = {
    1: ("ir_version", INT),
    2: ("producer_name", TEXT),
    3: ("producer_version", TEXT),
    4: ("domain", TEXT),
    5: ("model_version", INT),
    6: ("doc_string", TEXT),
    7: ("graph", BYTES),
    8: ("opset_import", MANY_BYTES),
    14: ("metadata_props", MANY_BYTES),
    20: ("training_info", MANY_BYTES),
    25: ("functions", MANY_BYTES),
}
_OPSET: Schema = {1: ("domain", TEXT), 2: ("version", INT)}
_GRAPH: Schema = {
    1: ("node", MANY_BYTES),
    2: ("name", TEXT),
    5: ("initializer", MANY_BYTES),
    10: ("doc_string", TEXT),
    11: ("input", MANY_BYTES),
    12: ("output", MANY_BYTES),
    13: ("value_info", MANY_BYTES),
    14: ("quantization_annotation", MANY_BYTES),
    15: ("sparse_initializer", MANY_BYTES),
    16: ("metadata_props", MANY_BYTES),
}
_NODE: Schema = {
    1: ("input", MANY_TEXTS),
    2: ("output", MANY_TEXTS),
    3: ("name", TEXT),
    4: ("op_type", TEXT),
    5: ("attribute", MANY_BYTES),
    6: ("doc_string", TEXT),
    7: ("domain", TEXT),
    8: ("overload", TEXT),
    9: ("metadata_props", MANY_BYTES),
}
_ATTRIBUTE: Schema = {
    1: ("name", TEXT),
    2: ("f", FLOAT),
    3: ("i", INT),
    4: ("s", BYTES),
    5: ("t", BYTES),
    6: ("g", BYTES),
    7: ("floats", MANY_FLOATS),
    8: ("ints", MANY_INTS),
    9: ("strings", MANY_BYTES),
    10: ("tensors", MANY_BYTES),
    11: ("graphs", MANY_BYTES),
    13: ("doc_string", TEXT),
    14: ("tp", BYTES),
    15: ("type_protos", MANY_BYTES),
    20: ("type", INT),
    21: ("ref_attr_name", TEXT),
    22: ("sparse_tensor", BYTES),
    23: ("sparse_tensors", MANY_BYTES),
}
# AttributeProto.type -> the field that then holds the value. The types left out hold graphs, lists
# of tensors, sparse tensors and types, which no allowed operator takes.
_ATTRIBUTE_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_ATTRIBUTE_NOTES = {"name", "type", "doc_string"}
_TENSOR: Schema = {
    1: ("dims", MANY_INTS),
    2: ("data_type", INT),
    4: ("float_data", BYTES),
    5: ("int32_data", BYTES),
    6: ("string_data", MANY_BYTES),
    7: ("int64_data", BYTES),
    8: ("name", TEXT),
    9: ("raw_data", BYTES),
    10: ("double_data", BYTES),
    11: ("uint64_data", BYTES),
    12: ("doc_string", TEXT),
    13: ("external_data", MANY_BYTES),
    14: ("data_location", INT),
    16: ("metadata_props", MANY_BYTES),
}
_VALUE_INFO: Schema = {
    1: ("name", TEXT),
    2: ("type", BYTES),
    3: ("doc_string", TEXT),
    4: ("metadata_props", MANY_BYTES),
}
_TYPE: Schema = {1: ("tensor_type", BYTES), 6: ("denotation", TEXT)}
_TENSOR_TYPE: Schema = {1: ("elem_type", INT), 2: ("shape", BYTES)}
_SHAPE: Schema = {1: ("dim", MANY_BYTES)}
_DIM: Schema = {1: ("dim_value", INT), 2: ("dim_param", TEXT), 3: ("denotation", TEXT)}
_STORED = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_NUMBERS = {1: "<f4", 6: "<i4", 7: "<i8", 11: "<f8"}


@dataclass(frozen=True, kw_only=True)
class WeightTensor:
    """A tensor whose values are in the file.

    Attributes:
        name: Its name; empty for the tensor of an attribute.
        data_type: ``TensorProto.DataType``.
        dims: Sizes as written.
        stored: ``{field: bytes}`` of the fields that hold values, such as ``raw_data``.
        external: Whether the values are said to be in another file.
        has_strings: Whether it holds text.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    stored: dict[str, memoryview]
    external: bool
    has_strings: bool

    def array(self) -> npt.NDArray[Any] | None:
        """The values of a float32, float64, int32 or int64 tensor; None for other types."""
        kind, content = next(iter(self.stored.items()), ("raw_data", memoryview(b"")))
        dtype = _NUMBERS.get(self.data_type)
        if dtype is None:
            return None
        if kind in ("int32_data", "int64_data"):
            return np.array(packed_ints(content), np.int64).astype(dtype)  # as readers cut them
        return np.frombuffer(content, dtype)

    def numbers(self) -> Sequence[float]:
        """The same as a list; none for other types."""
        found = self.array()
        return () if found is None else list(found.tolist())


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A node's attribute.

    Attributes:
        name: Its name.
        value: An int, a float, bytes (a view of them), a list of these, or a tensor;
            None for graphs, types, references and sparse tensors, which no tensor operator takes.
    """

    name: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator; an empty input name is an optional input that was left out."""

    name: str
    op_type: str
    domain: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Attribute, ...]


class Stated(NamedTuple):
    """What the file says of a value: data type, 0 if not stated, and sizes, None if not stated."""

    dtype: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model, decoded but not yet checked.

    Attributes:
        ir_version: Version of the file format.
        opsets: (domain, version) of every operator set it names.
        inputs: In graph order; dynamic axes are names.
        outputs: In graph order.
        stated: What it says of inputs, outputs and the values between them, by name.
        nodes: In graph order.
        weights: The initializers.
        extras: Which parts it has beyond these, such as ``"functions"``.
    """

    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stated: dict[str, Stated]
    nodes: tuple[Node, ...]
    weights: tuple[WeightTensor, ...]
    extras: tuple[str, ...] = field(default=())


def map_file(path: Path) -> memoryview:
    """Map the content of a file for as long as a view of it is kept."""
    with path.open("rb") as file:
        # Not closed: a failing read leaves slices of it in the error's traceback.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_graph(content: memoryview) -> Graph:
    """Decode the content of an ONNX file; the weights are views of it."""
    model = decode(content, _MODEL)
    if "graph" not in model:
        raise ValueError("a file without a graph")
    graph = decode(model["graph"], _GRAPH)
    return Graph(
        ir_version=model.get("ir_version", 0),
        opsets=tuple(_opset(item) for item in model.get("opset_import", ())),
        inputs=tuple(map(_spec, graph.get("input", ()))),
        outputs=tuple(map(_spec, graph.get("output", ()))),
        stated=_stated(graph),
        nodes=tuple(_node(item) for item in graph.get("node", ())),
        weights=tuple(read_tensor(item) for item in graph.get("initializer", ())),
        extras=tuple(
            name
            for name in ("training_info", "functions", "sparse_initializer")
            if name in model or name in graph
        ),
    )


def read_interface(
    content: memoryview,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file that was checked; nodes and weights are not decoded."""
    graph = decode(decode(content, _MODEL)["graph"], _GRAPH)
    return tuple(map(_spec, graph.get("input", ()))), tuple(map(_spec, graph.get("output", ())))


def _opset(message: memoryview) -> tuple[str, int]:
    fields = decode(message, _OPSET)
    return fields.get("domain", ""), fields.get("version", 0)


def _node(message: memoryview) -> Node:
    fields = decode(message, _NODE)
    return Node(
        name=fields.get("name", ""),
        op_type=fields.get("op_type", ""),
        domain=fields.get("domain", ""),
        overload=fields.get("overload", ""),
        inputs=tuple(fields.get("input", ())),
        outputs=tuple(fields.get("output", ())),
        attributes=tuple(_attribute(item) for item in fields.get("attribute", ())),
    )


def _attribute(message: memoryview) -> Attribute:
    fields = decode(message, _ATTRIBUTE)
    holder = _ATTRIBUTE_VALUES.get(fields.get("type", 0), "")
    name = fields.get("name", "")
    if fields.keys() - _ATTRIBUTE_NOTES - {holder}:
        return Attribute(name=name, value=None)
    empty: Any = [] if holder in ("floats", "ints", "strings") else None
    value = fields.get(holder, empty)
    if holder == "t" and value is not None:
        value = read_tensor(value)
    return Attribute(name=name, value=value)


def read_tensor(message: memoryview) -> WeightTensor:
    """Decode one tensor; its values stay views of the message."""
    fields = decode(message, _TENSOR)
    return WeightTensor(
        name=fields.get("name", ""),
        data_type=fields.get("data_type", 0),
        dims=tuple(fields.get("dims", ())),
        stored={name: fields[name] for name in _STORED if name in fields},
        external=bool(fields.get("data_location", 0)) or "external_data" in fields,
        has_strings="string_data" in fields,
    )


_Type = tuple[int, "tuple[int | str, ...] | None"]


def _spec(message: memoryview) -> TensorSpec:
    """An input or output of the graph."""
    name, (dtype, dims) = _value_info(message, {})
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor {name!r} that is not of numbers")
    return TensorSpec(name=name, dtype=_DTYPES[dtype], shape=dims or ())


def _value_info(message: memoryview, seen: dict[bytes, _Type]) -> tuple[str, _Type]:
    """A value's name, and its type; few values have one of their own, so each is decoded once."""
    fields = decode(message, _VALUE_INFO)
    content = bytes(fields.get("type", b""))
    if content not in seen:
        seen[content] = _type(memoryview(content))
    return fields.get("name", ""), seen[content]


def _type(message: memoryview) -> _Type:
    """Data type, 0 if none is stated, and shape, None if none is stated."""
    kind = decode(message, _TYPE)
    tensor = decode(kind["tensor_type"], _TENSOR_TYPE) if "tensor_type" in kind else {}
    if "shape" not in tensor:
        return tensor.get("elem_type", 0), None
    dims = decode(tensor["shape"], _SHAPE).get("dim", ())
    return tensor.get("elem_type", 0), tuple(_dim(item) for item in dims)


def _stated(graph: dict[str, Any]) -> dict[str, Stated]:
    """What the file says of its values' types and shapes."""
    found: dict[str, Stated] = {}
    seen: dict[bytes, _Type] = {}
    for group in ("value_info", "output", "input"):
        for message in graph.get(group, ()):
            name, (dtype, dims) = _value_info(message, seen)
            shape = [size if isinstance(size, int) else None for size in dims or ()]
            found[name] = Stated(dtype=dtype, shape=None if dims is None else tuple(shape))
    return found


def _dim(message: memoryview) -> int | str:
    fields = decode(message, _DIM)
    if len(fields.keys() & {"dim_value", "dim_param"}) > 1:
        raise ValueError("an axis with both a size and a name")
    size: int | str = fields.get("dim_value", fields.get("dim_param", "?"))
    return size


def quantised_layers(content: memoryview) -> int:
    """How many layers of an ONNX file multiply two tensors that were stored in 8 bits."""
    graph = read_graph(content)
    wide = {
        name for node in graph.nodes if node.op_type == "DequantizeLinear" for name in node.outputs
    }
    layers = [node for node in graph.nodes if node.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(set(node.inputs[:2]) <= wide for node in layers)


# --- protobuf ---


def decode(message: memoryview, schema: Schema) -> dict[str, Any]:
    """Decode one message; nested messages are left as bytes.

    Returns:
        Values by field name: a list for each repeated field present, signed 64-bit integers.
    """
    found: dict[str, Any] = {}
    position, end = 0, len(message)
    while position < end:
        key = message[position]
        if key < 0x80:  # a field number up to 15, as all known ones are
            position += 1
        else:
            key, position = _varint(message, position)
        name, kind = schema.get(key >> 3, ("", ""))
        if key & 7 not in _WIRE_TYPES.get(kind, ()):
            raise ValueError(f"field {key >> 3} of wire type {key & 7}, which is not expected here")
        value, position = _read_value(message, position, key & 7, kind)
        if kind not in _REPEATED:
            if name in found:
                raise ValueError(f"{name} given twice")
            found[name] = value
        elif isinstance(value, list):
            found.setdefault(name, []).extend(value)
        else:
            found.setdefault(name, []).append(value)
    return found


def packed_ints(content: memoryview) -> list[int]:
    """The signed 64-bit integers of a packed field."""
    values, position = [], 0
    while position < len(content):
        value, position = _varint(content, position)
        values.append(value)
    return values


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The signed 64-bit integer at ``position``, and the position after it."""
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1
    value = shift = 0
    for byte in message[position : position + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value - (1 << 64) if value >> 63 else value, position + shift // 7
    raise ValueError(f"a damaged integer at byte {position}")


def _read_value(message: memoryview, position: int, wire: int, kind: str) -> tuple[Any, int]:
    if wire == _VARINT:
        return _varint(message, position)
    if wire == _FOUR_BYTES:
        size = 4
    else:
        size, position = _varint(message, position)
    if not 0 <= size <= len(message) - position:
        raise ValueError("a truncated file")
    content = message[position : position + size]
    return _READERS[kind](content), position + size


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8")


def _float(content: memoryview) -> float:
    value: float = struct.unpack("<f", content)[0]
    return value


def _packed_floats(content: memoryview) -> list[float]:
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes of packed floats")
    return list(struct.unpack(f"<{len(content) // 4}f", content))


_READERS = {
    FLOAT: _float,
    TEXT: _text,
    MANY_TEXTS: _text,
    BYTES: lambda content: content,
    MANY_BYTES: lambda content: content,
    MANY_INTS: packed_ints,
    MANY_FLOATS: _packed_floats,
}
