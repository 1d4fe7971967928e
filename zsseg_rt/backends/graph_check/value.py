"""What the check knows of a tensor before a graph runs, and the sizes that a graph may state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from zsseg_rt.backends.graph_check.graph import WeightTensor

Dim = int | None
"""The size of an axis; None if it is known only at run time."""
Shape = tuple[Dim, ...]
Known = npt.NDArray[Any]
"""Integers as objects; None where one is known only at run time."""

INT32, INT64 = 6, 7
INTEGERS = (INT32, INT64)
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
_MOST_KNOWN = 1024  # no shape, padding or list of axes has more numbers
_LARGEST = 1 << 31  # OpenVINO computes integers in 32 bits


def known_size(shape: Shape) -> tuple[int, ...]:
    """Sizes with 1 for those that are known only at run time."""
    return tuple(1 if size is None else size for size in shape)


class Value:
    """A tensor of a graph."""

    __slots__ = ("_bounds", "_known", "columns", "dtype", "shape", "source", "tensor")

    def __init__(
        self,
        dtype: int,
        shape: Shape,
        *,
        tensor: WeightTensor | None = None,
        known: Known | None = None,
        bounds: tuple[int, int] | None = None,
        columns: tuple[tuple[int, int] | None, ...] = (),
        source: str = "",
    ) -> None:
        self.dtype, self.shape, self.tensor, self.source = dtype, shape, tensor, source
        self.columns = columns
        self._known, self._bounds = known, bounds

    @property
    def size(self) -> int:
        """Elements, where sizes that are not known count as one."""
        return math.prod(known_size(self.shape))

    def known(self) -> Known | None:
        """Its integers; None if they are not known, or too many to be a shape."""
        if self._known is None and self._is_list():
            self._known = self.numbers().astype(object)
        return self._known

    def _is_list(self) -> bool:
        return self.tensor is not None and self.dtype in INTEGERS and self.size <= _MOST_KNOWN

    def numbers(self) -> npt.NDArray[Any]:
        """The content of a constant of float32, float64, int32 or int64."""
        found = None if self.tensor is None else self.tensor.array()
        if found is None or found.size != self.size:
            raise ValueError("expected a constant of float32, int32 or int64, got a computed value")
        return found.reshape(known_size(self.shape))

    def bounds(self) -> tuple[int, int] | None:
        """Lowest and highest of a constant, or of places along an axis; None of other numbers."""
        if self._bounds is None and self.dtype in INTEGERS and self.tensor is not None:
            found = self.numbers()
            self._bounds = (int(found.min()), int(found.max())) if found.size else None
        if self._bounds and -_LARGEST <= self._bounds[0] <= self._bounds[1] < _LARGEST:
            return self._bounds
        return None


class Call:
    """A node with what is known of its inputs."""

    __slots__ = ("attributes", "inputs", "num_outputs", "op_type", "opset", "token_rows")

    def __init__(
        self,
        op_type: str,
        opset: int,
        inputs: Sequence[Value | None],
        attributes: dict[str, Any],
        num_outputs: int,
        token_rows: dict[str, int],
    ) -> None:
        self.op_type, self.opset, self.inputs = op_type, opset, inputs
        self.attributes, self.num_outputs, self.token_rows = attributes, num_outputs, token_rows

    def value(self, index: int) -> Value:
        """An input that the node has."""
        found = self.inputs[index]
        if found is None:
            raise ValueError(f"expected input {index}, got nothing")
        return found

    def given(self, index: int) -> Value | None:
        """An input; None if it was left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def number(self, name: str, default: int) -> int:
        """An integer attribute."""
        found: int = self.attributes.get(name, default)
        return found

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        found = self.attributes.get(name)
        return default if found is None else bytes(found).decode("ascii", "replace")

    def axis(self, rank: int, default: int = 0, *, extra: int = 0) -> int:
        """The attribute ``axis``, counted from the front."""
        return place("axis", self.number("axis", default), rank + extra)

    def axes(self, index: int, rank: int) -> list[int] | None:
        """Axes in an attribute, as before operator set 13 or 18, or in an input."""
        given = self.attributes.get("axes")
        if given is None and self.given(index) is not None:
            given = self.constants(index)
        if given is None:
            return None
        axes = [place("axes", axis, rank) for axis in given]
        if len(set(axes)) != len(axes):
            raise ValueError(f"axes: expected each axis once, got {given}")
        return axes

    def constants(self, index: int) -> list[int]:
        """The integers of an input that has to be known."""
        found = self.integers(index)
        if None in found:
            raise ValueError(f"input {index}: expected constants, got values of the graph")
        return [int(number) for number in found if number is not None]

    def integers(self, index: int) -> list[Dim]:
        """The integers of an input; None where one is known only at run time."""
        value = self.value(index)
        if value.dtype not in INTEGERS or len(value.shape) > 1 or None in value.shape:
            raise ValueError(
                f"input {index}: expected a list of integers, got data type {value.dtype} of "
                f"shape {list(value.shape)}"
            )
        known = value.known()
        if known is None:
            raise ValueError(f"input {index}: expected constants or sizes, got computed numbers")
        return list(known.reshape(-1))

    def mapped(self, index: int, change: Callable[[Known], Known]) -> Known | None:
        """The known integers of an input, moved as the node moves them."""
        known = self.value(index).known()
        return None if known is None else change(known)


def place(what: str, axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise ValueError(f"{what}: expected one of {rank} axes, got {axis}")
    return axis % rank


# --- sizes ---


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
