"""Write networks as ONNX files without the onnx package, one weight after another.

A weight is cast and laid out while it is written, so a file takes the memory of one.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

import zsseg_rt
from zsseg_rt.common.arrays import TensorSpec, is_half
from zsseg_rt.onnx.network import Network, Node, Weight, weight_of
from zsseg_rt.onnx.operations import ONNX_TYPES

_IR_VERSION = 10
_BLOCK = 64  # columns
_SMALL = 1024  # numbers; for fewer, the cast takes about as much as float16 saves


def save_onnx(network: Network, name: str, path: Path) -> None:
    """Write a network as one file."""
    with path.open("wb") as stream:
        write_onnx(network, name, stream)


def write_onnx(network: Network, name: str, stream: BinaryIO) -> None:
    """Write a network to an open file."""
    heads, size = [], 0
    for key, weight in network.weights.items():
        head, content = _tensor_head(key, weight), _num_bytes(weight)
        heads.append(_head(5, len(head) + content) + head)
        size += len(heads[-1]) + content
    graph = b"".join(
        [
            *(_sized(1, _node(node)) for node in network.nodes),
            _sized(2, name.encode()),
            *(_sized(11, _value(spec)) for spec in network.inputs),
            *(_sized(12, _value(spec)) for spec in network.outputs),
        ]
    )
    version = _sized(3, zsseg_rt.__version__.encode()) + _sized(8, _int(2, network.opset))
    stream.write(_int(1, _IR_VERSION) + _sized(2, b"zsseg_rt") + version)
    stream.write(_head(7, len(graph) + size) + graph)
    for head, weight in zip(heads, network.weights.values(), strict=True):
        stream.write(head)
        stream.write(_content(weight))


def with_exact_halves(network: Network) -> Network:
    """Store large weights that float16 holds exactly, such as CLIP's, in half the bytes."""
    weights: dict[str, Weight] = {}
    casts = []
    for name, weight in network.weights.items():
        large = weight.dtype == "float32" and weight.array.size >= _SMALL
        if large and is_half(weight.array):
            half = f"{name}.half"
            weights[half] = Weight(weight.array, "float16")
            casts.append(
                Node(f"cast_{name}", "Cast", (half,), (name,), {"to": ONNX_TYPES["float32"]})
            )
        else:
            weights[name] = weight
    return replace(network, nodes=(*casts, *network.nodes), weights=weights)


def _node(node: Node) -> bytes:
    parts = [_sized(1, name.encode()) for name in node.inputs]
    parts += [_sized(2, name.encode()) for name in node.outputs]
    parts += [_sized(3, node.name.encode()), _sized(4, node.kind.encode())]
    parts += [_sized(5, _attribute(*item)) for item in node.attributes.items()]
    return b"".join(parts)


def _attribute(name: str, value: Any) -> bytes:
    """``AttributeProto``: its name, the value in the field of its kind, and the kind."""
    if isinstance(value, (np.ndarray, Weight)):
        weight = value if isinstance(value, Weight) else weight_of(value)
        content, kind = _sized(5, _tensor_head("", weight) + _content(weight)), 4
    elif isinstance(value, bytes):
        content, kind = _sized(4, value), 3
    elif isinstance(value, float):
        content, kind = _float(2, value), 1
    elif isinstance(value, int):
        content, kind = _int(3, value), 2
    elif value and isinstance(value[0], bytes):
        content, kind = b"".join(_sized(9, one) for one in value), 8
    elif value and isinstance(value[0], float):
        content, kind = b"".join(_float(7, one) for one in value), 6
    else:
        content, kind = b"".join(_int(8, one) for one in value), 7
    return _sized(1, name.encode()) + content + _int(20, kind)


def _value(spec: TensorSpec) -> bytes:
    """``ValueInfoProto`` of an input or output."""
    dims = b"".join(
        _sized(1, _sized(2, size.encode()) if isinstance(size, str) else _int(1, size))
        for size in spec.shape
    )
    tensor = _int(1, ONNX_TYPES[spec.dtype]) + _sized(2, dims)
    return _sized(1, spec.name.encode()) + _sized(2, _sized(1, tensor))


def _tensor_head(name: str, weight: Weight) -> bytes:
    """``TensorProto`` up to the values, which follow."""
    dims = b"".join(_int(1, size) for size in weight.array.shape)
    return (
        dims
        + _int(2, ONNX_TYPES[weight.dtype])
        + (_sized(8, name.encode()) if name else b"")
        + _head(9, _num_bytes(weight))
    )


def _content(weight: Weight) -> memoryview:
    """The numbers as ``raw_data`` holds them."""
    if weight.array.dtype.kind == "u" and not weight.dtype.startswith("uint"):
        numbers: npt.NDArray[Any] = np.ascontiguousarray(weight.array)  # the bits themselves
    elif weight.dtype == "bfloat16":
        numbers = _bfloat16(_laid_out(weight.array, "float32"))
    else:
        numbers = _laid_out(weight.array, weight.dtype)
    return numbers.reshape(-1).view(np.uint8).data


def _laid_out(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Row by row; transposed weights in blocks that fit a cache: a fifth of the time."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array, dtype)
    rows = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], _BLOCK):
        rows[:, start : start + _BLOCK] = array[:, start : start + _BLOCK]
    return rows


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def _num_bytes(weight: Weight) -> int:
    width = 2 if weight.dtype == "bfloat16" else 1
    if weight.dtype != "bfloat16" and not weight.dtype.startswith("float8"):
        width = np.dtype(weight.dtype).itemsize
    return int(weight.array.size) * width


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _sized(field: int, content: bytes) -> bytes:
    return _head(field, len(content)) + content


def _head(field: int, size: int) -> bytes:
    """The tag and length before content of so many bytes."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
