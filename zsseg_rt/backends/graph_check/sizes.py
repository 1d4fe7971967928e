"""Bound the sizes that an ONNX graph states: tensors, shapes, repeats, paddings, kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from zsseg_rt.backends.graph_check.graph import Node, WeightTensor

__all__ = ["MAX_ELEMENTS", "check_node_sizes", "check_shape", "check_weight"]

MAX_ELEMENTS = 1 << 28  # 1 GB of float32, ten times the features of the largest frame
_MAX_RANK = 16
_MAX_STEP = 1 << 16  # of kernels, strides and dilations
_FEW = 64  # no shape has more sizes than this

# Bits per element by TensorProto.DataType; text (8) and complex numbers (14, 15) are refused.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64}
_BITS |= {16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4}
# Where values are if not in raw_data: floats of this many bytes, or integers of 1 to 10 bytes.
_TYPED = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_FLOAT_BYTES = {"float_data": 4, "double_data": 8}

# The input that holds the result's sizes, and the operators where -1 means "as it comes".
_SIZE_INPUTS = {"AffineGrid": 1, "CenterCropPad": 1, "Col2Im": 1, "ConstantOfShape": 0}
_SIZE_INPUTS |= {"Expand": 1, "MaxUnpool": 2, "OneHot": 1, "Reshape": 1, "Resize": 3, "TopK": 1}
_OPEN_SIZES = ("Expand", "Reshape")
# The input whose values multiply the size of the first input.
_FACTOR_INPUTS = {"Resize": 2, "Tile": 1}
_STEPS = ("kernel_shape", "strides", "dilations", "blocksize", "group")
_SIZE_ATTRIBUTES = {"output_shape", "output_height", "output_width", "pooled_shape"}
_SIZE_ATTRIBUTES |= {"num_outputs", "strides"}


def check_shape(where: str, sizes: Sequence[int]) -> None:
    """Check the known sizes of a tensor.

    Raises:
        ValueError: One is negative, or together they exceed ``MAX_ELEMENTS``.
    """
    _check_sizes(where, sizes)
    if len(sizes) > _MAX_RANK:
        raise ValueError(f"{where}: expected at most {_MAX_RANK} axes, got {len(sizes)}")


def check_weight(where: str, tensor: WeightTensor) -> None:
    """Check that a tensor's values are in the file, and that their number matches its sizes.

    Raises:
        ValueError: They are elsewhere, of an unknown type, or too many or too few.
    """
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


def check_node_sizes(where: str, node: Node, constants: Mapping[str, WeightTensor]) -> None:
    """Check the sizes in a node's attributes and in those inputs that are constants.

    Raises:
        ValueError: One is negative or not finite, or the result exceeds ``MAX_ELEMENTS``.
    """
    for attribute in node.attributes:
        values = attribute.value if isinstance(attribute.value, list) else [attribute.value]
        if values and all(isinstance(value, int) for value in values):
            _check_attribute(f"{where}: {attribute.name}", attribute.name, values)
    sizes = _numbers(node, _SIZE_INPUTS.get(node.op_type), constants)
    if node.op_type in _OPEN_SIZES:
        sizes = [1 if size == -1 else size for size in sizes]
    _check_sizes(where, sizes)
    factors = _numbers(node, _FACTOR_INPUTS.get(node.op_type), constants)
    if factors:
        _check_sizes(where, [*factors, _elements(constants.get(node.inputs[0]))])
    if node.op_type == "Pad":
        _check_pads(where, _numbers(node, 1, constants))
    if node.op_type == "Range":
        _check_range(where, [_numbers(node, index, constants) for index in range(3)])


def _holds(kind: str, content: memoryview, data_type: int, expected: int) -> bool:
    if kind == "raw_data":
        return len(content) == (expected * _BITS[data_type] + 7) // 8
    if kind != _TYPED.get(data_type, "int32_data") or _BITS[data_type] < 8:
        return False
    if kind in _FLOAT_BYTES:
        return len(content) == expected * _FLOAT_BYTES[kind]
    ends = bytes(content).translate(None, bytes(range(0x80, 0x100)))  # an integer's last byte
    return len(ends) == expected


def _check_attribute(where: str, name: str, values: list[int]) -> None:
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


def _check_range(where: str, parts: Sequence[Sequence[float]]) -> None:
    if all(len(part) == 1 for part in parts):
        (start,), (limit,), (delta,) = parts
        if not all(map(math.isfinite, (start, limit, delta))) or not delta:
            raise ValueError(f"{where}: expected finite numbers and a step, got {parts}")
        _check_sizes(where, [max(0, (limit - start) / delta)])


def _numbers(
    node: Node, index: int | None, constants: Mapping[str, WeightTensor]
) -> Sequence[float]:
    """The values of a node's input if it is a small constant; otherwise none."""
    if index is None or index >= len(node.inputs):
        return ()
    tensor = constants.get(node.inputs[index])
    return tensor.numbers() if tensor is not None and _elements(tensor) <= _FEW else ()


def _elements(tensor: WeightTensor | None) -> int:
    return 1 if tensor is None else math.prod(tensor.dims)
