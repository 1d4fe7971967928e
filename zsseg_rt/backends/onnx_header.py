"""Read the inputs and outputs of an ONNX file without the onnx package.

Only the few protobuf fields that describe the interface are decoded; weights are skipped over, so
a large file costs microseconds. Field numbers are those of ``onnx.proto`` (ONNX IR).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zsseg_rt.backends.base import TensorSpec
from zsseg_rt.errors import BackendError

__all__ = ["GraphHeader", "read_header"]

_MODEL_GRAPH, _GRAPH_INPUT, _GRAPH_OUTPUT = 7, 11, 12
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}

Bytes = memoryview
Field = tuple[int, "int | Bytes"]


@dataclass(frozen=True, kw_only=True)
class GraphHeader:
    """The interface of an ONNX graph, in graph order; dynamic axes are names."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_header(path: Path) -> GraphHeader:
    """Read the interface of an ONNX file.

    Raises:
        BackendError: The file is missing, or is no ONNX graph with tensor inputs and outputs.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Not closed here: a failing read leaves slices of it in the error's traceback.
        return _read_model(memoryview(data))
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as exc:
        raise BackendError(
            f"{path}: expected an ONNX graph, got {exc}. Copy the bundle again."
        ) from exc


def _read_model(model: Bytes) -> GraphHeader:
    graph = _only(model, _MODEL_GRAPH)
    values: dict[int, list[TensorSpec]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: []}
    for number, value in _fields(graph):
        if number in values and isinstance(value, memoryview):
            values[number].append(_read_value_info(value))
    if not values[_GRAPH_INPUT] or not values[_GRAPH_OUTPUT]:
        raise ValueError("a file without graph inputs or outputs")
    return GraphHeader(inputs=tuple(values[_GRAPH_INPUT]), outputs=tuple(values[_GRAPH_OUTPUT]))


def _read_value_info(value: Bytes) -> TensorSpec:
    name = _text(_only(value, 1))
    tensor = _only(_only(value, 2), 1)
    dtype, shape = "", []
    for number, item in _fields(tensor):
        if number == 1 and isinstance(item, int):
            dtype = _DTYPES.get(item, "")
        elif number == 2 and isinstance(item, memoryview):
            shape = [_read_dim(dim) for n, dim in _fields(item) if n == 1]
    if not dtype:
        raise ValueError(f"a tensor {name!r} of an unknown type")
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape))


def _read_dim(dim: int | Bytes) -> int | str:
    if isinstance(dim, memoryview):
        for number, item in _fields(dim):
            if number == 1 and isinstance(item, int):
                return item
            if number == 2 and isinstance(item, memoryview):
                return _text(item)
    return "?"


def _text(value: Bytes) -> str:
    return bytes(value).decode("utf-8")


def _only(message: Bytes, number: int) -> Bytes:
    for found, value in _fields(message):
        if found == number and isinstance(value, memoryview):
            return value
    raise ValueError(f"a message without field {number}")


def _fields(message: Bytes) -> Iterator[Field]:
    """Yield (field number, integer or bytes); fixed-width fields are skipped."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            integer, position = _varint(message, position)
            yield number, integer
            continue
        if wire == 2:
            size, position = _varint(message, position)
            if position + size > end:
                raise ValueError("a truncated file")
            yield number, message[position : position + size]
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        position += size


def _varint(message: Bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"an overlong integer at byte {position}")
