"""Bound the sizes that an ONNX graph states: tensors, shapes, repeats, paddings, kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zsseg_rt.backends.graph_check.graph import WeightTensor

MAX_ELEMENTS = 1 << 28  # 1 GB of float32, ten times the features of the largest frame
_MAX_RANK = 16
_MAX_STEP = 1 << 16  # of kernels, strides and dilations

# Bits per element by TensorProto.DataType; text (8) and complex numbers (14, 15) are refused.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64}
_BITS |= {16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4}
# Where values are if not in raw_data: floats of this many bytes, or integers of 1 to 10 bytes.
_TYPED = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_FLOAT_BYTES = {"float_data": 4, "double_data": 8}

_STEPS = ("kernel_shape", "strides", "dilations", "blocksize", "group")
_SIZE_ATTRIBUTES = {"num_outputs", "strides"}


def check_shape(where: str, sizes: Sequence[int]) -> None:
    """Check the known sizes of a tensor."""
    _check_sizes(where, sizes)
    if len(sizes) > _MAX_RANK:
        raise ValueError(f"{where}: expected at most {_MAX_RANK} axes, got {len(sizes)}")


def check_weight(where: str, tensor: WeightTensor) -> None:
    """Check that a tensor's values are in the file, and that their number matches its sizes."""
    if tensor.external:
        raise ValueError(f"{where}: expected its values in the file, got external data")
    if tensor.data_type not in _BITS or tensor.has_strings:
        raise ValueError(f"{where}: expected numbers, got data type {tensor.data_type}")
    check_shape(where, [min(size, 1) for size in tensor.dims])
    if len(tensor.stored) > 1:
        raise ValueError(f"{where}: expected one kind of data, got {', '.join(tensor.stored)}")
    expected = math.prod(tensor.dims)
    kind, content = next(iter(tensor.stored.items()), ("raw_data", memoryview(b"")))
    if not _holds(kind, content, tensor.data_type, expected):
        raise ValueError(
            f"{where}: expected {expected} values of data type {tensor.data_type} for sizes "
            f"{list(tensor.dims)}, got {len(content)} bytes of {kind}"
        )
    if not expected:
        check_shape(where, [size or 1 for size in tensor.dims])


def _holds(kind: str, content: memoryview, data_type: int, expected: int) -> bool:
    if kind == "raw_data":
        return len(content) == (expected * _BITS[data_type] + 7) // 8
    if kind != _TYPED.get(data_type, "int32_data") or _BITS[data_type] < 8:
        return False
    if kind in _FLOAT_BYTES:
        return len(content) == expected * _FLOAT_BYTES[kind]
    ends = bytes(content).translate(None, bytes(range(0x80, 0x100)))  # an integer's last byte
    return len(ends) == expected


def check_attribute(where: str, name: str, value: Any) -> None:
    """Check a tensor, or the sizes in a node's attribute."""
    if isinstance(value, WeightTensor):
        check_weight(where, value)
    values = value if isinstance(value, list) else [value]
    if name in _STEPS and not all(1 <= value <= _MAX_STEP for value in values):
        raise ValueError(f"{where}: expected 1 to {_MAX_STEP}, got {values}")
    if name in _SIZE_ATTRIBUTES:
        _check_sizes(where, values)
    if name in ("pads", "output_padding"):
        _check_pads(where, values)


def _check_sizes(where: str, sizes: Sequence[float]) -> None:
    fits = all(0 <= size < math.inf for size in sizes)
    if not fits or math.prod(size or 1 for size in sizes) > MAX_ELEMENTS:
        raise ValueError(
            f"{where}: expected sizes of 0 or more for at most {MAX_ELEMENTS} elements, got "
            f"{list(sizes)}"
        )


def _check_pads(where: str, pads: Sequence[float]) -> None:
    """The first half pads before each axis, the second half after it."""
    half = len(pads) // 2
    _check_sizes(where, [abs(pad) + 1 for pad in pads[2 * half :]])
    _check_sizes(where, [abs(a) + abs(b) + 1 for a, b in zip(pads, pads[half:], strict=False)])
