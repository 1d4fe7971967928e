"""Read ONNX files as networks without the onnx package; weights stay views of the file.

Field numbers are those of ``onnx.proto`` (ONNX IR). Refused is what can be read in more than one
way: a file that one reader checks and another runs must not hold any.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.onnx.network import Network, Node, Weight
from zsseg_rt.onnx.operations import DTYPES

OPSETS = range(11, 25)  # the exporters here write 20; encoders made elsewhere use 11 to 24
MAX_ELEMENTS = 1 << 28  # 1 GB of float32, ten times the features of the largest frame

STANDARD = ("", "ai.onnx")
_IR_VERSIONS = range(4, 15)
_NEWEST_OPSET = 1000  # of a foreign domain that is named but not used
_MAX_NODES = 1 << 14  # ViT-L has 1,500; runtimes walk the graph recursively
_MAX_RANK = 16
_SMALL = 4096  # bytes: a message of fewer is copied, which reads faster than a view

# Kinds of fields; nested messages stay bytes. A repeated field is a list.
_VARINT, _SIZED, _FLOAT = 0, 2, 5
_Schema = dict[int, tuple[str, bool, Any]]


def _schema(ints: str = "", texts: str = "", messages: str = "", floats: str = "") -> _Schema:
    """Fields by key, from ``"NUMBER NAME"`` pairs; a name that ends in ``*`` is repeated."""
    schema: _Schema = {}
    groups = ((ints, _VARINT, None), (texts, _SIZED, str), (messages, _SIZED, None))
    for names, wire, read in (*groups, (floats, _FLOAT, _float)):
        words = names.split()
        for number, name in zip(words[::2], words[1::2], strict=True):
            many = name.endswith("*")
            schema[int(number) << 3 | wire] = (name.rstrip("*"), many, read)
            if many and wire != _SIZED:
                packed = packed_ints if wire == _VARINT else _packed_floats
                schema[int(number) << 3 | _SIZED] = (name.rstrip("*"), many, packed)
    return schema


def _float(content: Any) -> float:
    value: float = struct.unpack("<f", content)[0]
    return value


def packed_ints(content: Any) -> list[int]:
    """The signed 64-bit integers of a packed field."""
    values, position = [], 0
    while position < len(content):
        value, position = _varint(content, position)
        values.append(value)
    return values


def _packed_floats(content: Any) -> list[float]:
    if len(content) % 4:
        raise DamagedError(f"{len(content)} bytes of packed floats")
    return list(struct.unpack(f"<{len(content) // 4}f", content))


_PACKED = (packed_ints, _packed_floats)
_MODEL = _schema(
    ints="1 ir_version 5 model_version",
    texts="2 producer_name 3 producer_version 4 domain 6 doc_string",
    messages="7 graph 8 opset_import* 14 metadata_props* 20 training_info* 25 functions*",
)
_OPSET = _schema(ints="2 version", texts="1 domain")
_GRAPH = _schema(
    texts="2 name 10 doc_string",
    messages="1 node* 5 initializer* 11 input* 12 output* 13 value_info* "
    "14 quantization_annotation* 15 sparse_initializer* 16 metadata_props*",
)
_NODE = _schema(
    texts="1 input* 2 output* 3 name 4 op_type 6 doc_string 7 domain 8 overload",
    messages="5 attribute* 9 metadata_props*",
)
_ATTRIBUTE = _schema(
    ints="3 i 8 ints* 20 type",
    floats="2 f 7 floats*",
    texts="1 name 13 doc_string 21 ref_attr_name",
    messages="4 s 5 t 6 g 9 strings* 10 tensors* 11 graphs* 14 tp 15 type_protos* "
    "22 sparse_tensor 23 sparse_tensors*",
)
# AttributeProto.type -> the field that then holds the value. The types left out hold graphs, lists
# of tensors, sparse tensors and types, which no allowed operator takes.
_ATTRIBUTE_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_ATTRIBUTE_NOTES = {"name", "type", "doc_string"}
_TENSOR = _schema(
    ints="1 dims* 2 data_type 14 data_location",
    texts="8 name 12 doc_string",
    messages="4 float_data 5 int32_data 6 string_data* 7 int64_data 9 raw_data 10 double_data "
    "11 uint64_data 13 external_data* 16 metadata_props*",
)
_VALUE_INFO = _schema(texts="1 name 3 doc_string", messages="2 type 4 metadata_props*")
_TYPE = _schema(texts="6 denotation", messages="1 tensor_type")
_TENSOR_TYPE = _schema(ints="1 elem_type", messages="2 shape")
_SHAPE = _schema(messages="1 dim*")
_ENTRY = _schema(texts="1 key 2 value")
_DIM = _schema(ints="1 dim_value", texts="2 dim_param 3 denotation")

_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_STORED = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# Where values are if not in raw_data: floats, or integers of 1 to 10 bytes.
_TYPED = {"float32": "float_data", "int64": "int64_data", "float64": "double_data"}
_TYPED |= {"uint32": "uint64_data", "uint64": "uint64_data"}


class DamagedError(ValueError):
    """Bytes that are no ONNX file."""


def map_file(path: Path) -> memoryview:
    """Map the content of a file for as long as a view of it is kept."""
    with path.open("rb") as file:
        try:  # Not closed: a failing read leaves slices of it in the error's traceback.
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:
            raise DamagedError("an empty file") from None


def read_network(content: memoryview | bytes, *, beside: Path | None = None) -> Network:
    """Decode an ONNX file; weights may be in files of the folder ``beside``, if one is given."""
    model = decode(content, _MODEL)
    if "graph" not in model:
        raise DamagedError("a file without a graph")
    graph = decode(model["graph"], _GRAPH)
    attributes: dict[Any, Mapping[str, Any]] = {}
    nodes = tuple(_node(message, attributes) for message in graph.get("node", ()))
    inputs, outputs = _interface(graph)
    opset = _check_model(model, graph, (inputs, outputs))
    weights: dict[str, Weight] = {}
    for message in graph.get("initializer", ()):
        name, weight = _weight(message, "weight", beside)
        if not name or name in weights:
            raise ValueError(f"weights: expected a new name for each value, got {name!r}")
        weights[name] = weight
    return Network(inputs=inputs, outputs=outputs, nodes=nodes, weights=weights, opset=opset)


_Interface = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def read_interface(content: memoryview) -> _Interface:
    """Inputs and outputs of an ONNX file that was checked; nodes and weights are not decoded."""
    return _interface(decode(decode(content, _MODEL)["graph"], _GRAPH))


def _interface(graph: Mapping[str, Any]) -> _Interface:
    inputs = tuple(_spec(message, needs_shape=True) for message in graph.get("input", ()))
    return inputs, tuple(_spec(message) for message in graph.get("output", ()))


def quantised_layers(content: memoryview) -> int:
    """How many layers of an ONNX file multiply two tensors that were stored in 8 bits."""
    nodes = read_network(content).nodes
    wide = {name for node in nodes if node.kind == "DequantizeLinear" for name in node.outputs}
    layers = [node for node in nodes if node.kind in ("MatMul", "Gemm", "Conv")]
    return sum(set(node.inputs[:2]) <= wide for node in layers)


def _check_model(
    model: Mapping[str, Any], graph: Mapping[str, Any], specs: Sequence[Sequence[TensorSpec]]
) -> int:
    """Check what surrounds the nodes; returns the version of the standard operators."""
    version = model.get("ir_version", 0)
    if version not in _IR_VERSIONS:
        raise ValueError(
            f"ir_version: expected {_IR_VERSIONS[0]} to {_IR_VERSIONS[-1]}, got {version}"
        )
    fields = [decode(message, _OPSET) for message in model.get("opset_import", ())]
    opsets = [(each.get("domain", ""), each.get("version", 0)) for each in fields]
    # onnx.compose lists a set once for each graph that it merged.
    standard = sorted({version for domain, version in opsets if domain in STANDARD})
    if len(standard) != 1 or standard[0] not in OPSETS:
        raise ValueError(
            f"opset_import: expected one version of {OPSETS[0]} to {OPSETS[-1]} for the standard "
            f"operators, got {standard}"
        )
    if any(not 0 <= version <= _NEWEST_OPSET for _, version in opsets):
        raise ValueError(f"opset_import: expected at most {_NEWEST_OPSET}, got {opsets}")
    extras = ("training_info", "functions", "sparse_initializer")
    unfit = [name for name in extras if name in model or name in graph]
    if unfit:
        raise ValueError(f"graph: expected only nodes and weights, got {', '.join(unfit)}")
    count = len(graph.get("node", ()))
    if not specs[0] or not specs[1] or count > _MAX_NODES:
        raise ValueError(
            f"graph: expected inputs, outputs and at most {_MAX_NODES} nodes, got "
            f"{len(specs[0])} inputs, {len(specs[1])} outputs and {count} nodes"
        )
    for spec in (*specs[0], *specs[1]):
        sizes = [size for size in spec.shape if isinstance(size, int)]
        check_shape(f"tensor {spec.name!r}", [*sizes, *[1] * (len(spec.shape) - len(sizes))])
    return int(standard[0])


def _small(message: memoryview | bytes) -> memoryview | bytes:
    return bytes(message) if len(message) < _SMALL else message


def _node(message: memoryview, decoded: dict[Any, Mapping[str, Any]]) -> Node:
    fields = decode(_small(message), _NODE)
    kind, name = fields.get("op_type", ""), fields.get("name", "")
    domain = fields.get("domain", "")
    if domain not in STANDARD or "overload" in fields:
        kind = f"{kind!r} of domain {domain!r}"  # no operator is called so
    messages = fields.get("attribute", ())
    key = tuple(messages) if all(type(each) is bytes for each in messages) else None
    attributes = decoded.get(key)
    if attributes is None or key is None:
        attributes = _attributes(f"node {name!r} ({kind})", messages)
        if key is not None:  # most nodes have the attributes of another one
            decoded[key] = attributes
    outputs = tuple(fields.get("output", ()))
    return Node(name, kind, tuple(fields.get("input", ())), outputs, attributes)


def _attributes(where: str, messages: Sequence[Any]) -> Mapping[str, Any]:
    attributes: dict[str, Any] = {}
    for message in messages:
        fields = decode(message, _ATTRIBUTE)
        name, holder = fields.get("name", ""), _ATTRIBUTE_VALUES.get(fields.get("type", 0), "")
        if name in attributes:
            names = [decode(each, _ATTRIBUTE).get("name", "") for each in messages]
            raise ValueError(f"{where}: expected each attribute once, got {', '.join(names)}")
        value = fields.get(holder, [] if holder in ("floats", "ints", "strings") else None)
        if fields.keys() - _ATTRIBUTE_NOTES - {holder}:
            value = None
        elif holder == "t" and value is not None:
            value = _weight(value, f"{where}: {name}")[1]
        elif holder == "s" and value is not None:
            value = bytes(value)
        elif holder == "strings":
            value = [bytes(each) for each in fields.get(holder, ())]
        attributes[name] = value
    return attributes


# --- tensors ---


def _weight(message: memoryview, what: str, beside: Path | None = None) -> tuple[str, Weight]:
    """Decode one tensor; its values stay a view of the message. ``what`` begins its errors."""
    fields = decode(_small(message), _TENSOR)
    name, number = fields.get("name", ""), fields.get("data_type", 0)
    where = f"{what} {name!r}" if what == "weight" else what
    entries = fields.pop("external_data", ())
    if beside is not None and entries and fields.pop("data_location", 0) == 1:
        fields["raw_data"] = _part_of_file(where, entries, beside)
    elif entries or fields.get("data_location", 0):
        raise ValueError(f"{where}: expected its values in the file, got external data")
    if number not in DTYPES or "string_data" in fields:
        raise ValueError(f"{where}: expected numbers, got data type {number}")
    dims, dtype = tuple(fields.get("dims", ())), DTYPES[number]
    check_shape(where, [min(size, 1) for size in dims])
    stored = {key: fields[key] for key in _STORED if key in fields}
    if len(stored) > 1:
        raise ValueError(f"{where}: expected one kind of data, got {', '.join(stored)}")
    kind, content = next(iter(stored.items()), ("raw_data", b""))
    expected = math.prod(dims)
    array = _numbers(dtype, kind, content, expected)
    if array is None:
        raise ValueError(
            f"{where}: expected {expected} values of data type {number} for sizes "
            f"{list(dims)}, got {len(content)} bytes of {kind}"
        )
    if not expected:
        check_shape(where, [size or 1 for size in dims])
    return name, Weight(array.reshape(dims), dtype)


def _part_of_file(where: str, entries: Sequence[Any], folder: Path) -> memoryview:
    """The bytes that a tensor names, of a file in a folder."""
    pairs = [decode(entry, _ENTRY) for entry in entries]
    facts = {pair.get("key", ""): pair.get("value", "") for pair in pairs}
    place = Path(facts.get("location", ""))
    if place.is_absolute() or ".." in place.parts or not (folder / place).is_file():
        raise ValueError(f"{where}: expected its values in a file beside the graph, got {place}")
    content = map_file(folder / place)
    start = int(facts.get("offset", 0))
    stop = start + int(facts.get("length", len(content) - start))
    if not 0 <= start <= stop <= len(content):
        raise ValueError(f"{where}: expected bytes {start} to {stop}, got the end of {place}")
    return content[start:stop]


def _numbers(dtype: str, kind: str, content: Any, expected: int) -> npt.NDArray[Any] | None:
    """The values of a tensor; None if they are not as many."""
    bits = np.dtype(_BITS.get(dtype, dtype))
    if kind not in ("raw_data", _TYPED.get(dtype, "int32_data")):
        return None
    if kind in ("raw_data", "float_data", "double_data"):
        fits = len(content) == expected * bits.itemsize
        return np.frombuffer(content, bits) if fits else None
    ends = bytes(content).translate(None, bytes(range(0x80, 0x100)))  # an integer's last byte
    if len(ends) != expected:
        return None
    values = np.array(packed_ints(content), np.int64)  # as readers cut them
    return values.astype(np.uint16).view(bits) if dtype == "float16" else values.astype(bits)


def check_shape(where: str, sizes: Sequence[float]) -> None:
    """Refuse sizes below 0, of more than ``MAX_ELEMENTS`` in all, and more than 16 of them."""
    fits = not sizes or 0 <= min(sizes) <= max(sizes) < math.inf
    if not fits or math.prod([size or 1 for size in sizes]) > MAX_ELEMENTS:
        raise ValueError(
            f"{where}: expected sizes of 0 or more for at most {MAX_ELEMENTS} elements, got "
            f"{list(sizes)}"
        )
    if len(sizes) > _MAX_RANK:
        raise ValueError(f"{where}: expected at most {_MAX_RANK} axes, got {len(sizes)}")


# --- inputs and outputs ---


def _spec(message: memoryview, *, needs_shape: bool = False) -> TensorSpec:
    """An input or output; one without a stated shape is taken for a number."""
    fields = decode(message, _VALUE_INFO)
    name, kind = fields.get("name", ""), decode(fields.get("type", b""), _TYPE)
    tensor = decode(kind.get("tensor_type", b""), _TENSOR_TYPE)
    if tensor.get("elem_type", 0) not in DTYPES:
        raise DamagedError(f"a tensor {name!r} that is not of numbers")
    if needs_shape and "shape" not in tensor:
        raise ValueError(f"graph input {name!r}: expected a shape, got none")
    dims = decode(tensor.get("shape", b""), _SHAPE).get("dim", ())
    return TensorSpec(name=name, dtype=DTYPES[tensor["elem_type"]], shape=tuple(map(_dim, dims)))


def _dim(message: bytes) -> int | str:
    fields = decode(message, _DIM)
    if len(fields.keys() & {"dim_value", "dim_param"}) > 1:
        raise DamagedError("an axis with both a size and a name")
    size: int | str = fields.get("dim_value", fields.get("dim_param", "?"))
    return size


# --- protobuf ---


def decode(message: Any, schema: _Schema) -> dict[str, Any]:
    """Decode one message; nested messages are left as bytes."""
    try:
        return _decode(message, schema)
    except IndexError:
        raise DamagedError(f"a damaged integer at byte {len(message)}") from None
    except UnicodeDecodeError as exc:
        raise DamagedError(str(exc)) from exc


def _decode(message: Any, schema: _Schema) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    position, end = 0, len(message)
    while position < end:
        key = message[position]
        position += 1
        if key >= 0x80:
            key, position = _varint(message, position - 1)
        field = schema.get(key)
        if field is None:
            raise DamagedError(
                f"field {key >> 3} of wire type {key & 7}, which is not expected here"
            )
        name, many, read = field
        wire, size = key & 7, 4
        if wire != _FLOAT:
            size = message[position]
            position += 1
            if size >= 0x80:  # few are of more than one byte
                size, position = _varint(message, position - 1)
        value: Any = size
        if wire != _VARINT:
            stop = position + size
            if not position <= stop <= end:
                raise DamagedError("a truncated file")
            value, position = message[position:stop], stop
            if read is str:
                value = str(value, "utf-8")
            elif read is not None:
                value = read(value)
        if not many:
            if name in fields:
                raise DamagedError(f"{name} given twice")
            fields[name] = value
        elif name not in fields:
            fields[name] = value if read in _PACKED else [value]
        elif read in _PACKED:
            fields[name] += value
        else:
            fields[name].append(value)
    return fields


def _varint(message: Any, position: int) -> tuple[int, int]:
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
    raise DamagedError(f"a damaged integer at byte {position}")
