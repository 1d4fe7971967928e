"""What the check knows of a tensor before a graph runs: type, sizes, numbers, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.graph_check.graph import WeightTensor

Dim = int | None
"""The size of an axis; None if it is known only at run time."""
Shape = tuple[Dim, ...]
Known = npt.NDArray[Any]
"""Integers as objects; None where one is known only at run time."""

INT32, INT64 = 6, 7
INTEGERS = (INT32, INT64)
_MOST_KNOWN = 1024  # no shape, padding or list of axes has more numbers
LARGEST = 1 << 31  # OpenVINO computes integers in 32 bits


def full(shape: Shape, number: int | None) -> Known | None:
    """An array of one number; None if the sizes are not known, or too many for a shape."""
    if None in shape or math.prod(known_size(shape)) > _MOST_KNOWN:
        return None
    return np.full(known_size(shape), number, object)


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

    def is_sized(self) -> bool:
        """Whether its numbers follow from sizes and constants, known before a run or not."""
        is_small = self.tensor is not None and self.size <= _MOST_KNOWN
        return is_small or self.known() is not None

    def _is_list(self) -> bool:
        return self.tensor is not None and self.dtype in INTEGERS and self.size <= _MOST_KNOWN

    def numbers(self) -> npt.NDArray[Any]:
        """The content of a constant of float32, float64, int32 or int64."""
        found = None if self.tensor is None else self.tensor.array()
        if found is None or found.size != self.size:
            raise ValueError("expected a constant of float32, int32 or int64, got a computed value")
        return found.reshape(known_size(self.shape))

    def bounds(self) -> tuple[int, int] | None:
        """Lowest and highest integer; None if they are not bounded, or there are none."""
        if self._bounds is None and self.dtype in INTEGERS:
            found = self.numbers() if self.tensor is not None else self._known
            if found is not None and found.size and None not in found.reshape(-1)[:_MOST_KNOWN]:
                self._bounds = int(found.min()), int(found.max())
        if self._bounds and -LARGEST <= self._bounds[0] <= self._bounds[1] < LARGEST:
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
