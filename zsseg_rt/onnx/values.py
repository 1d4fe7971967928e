"""What is known of a value before a network runs, and how a node's rule asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

Dim = int | None
"""The size of an axis; None if it is known only at run time."""
Shape = tuple[Dim, ...]

INT32, INT64 = 6, 7
INTEGERS = (INT32, INT64)
_MOST_KNOWN = 1024  # no shape, padding or list of axes has more numbers
_LARGEST = 1 << 31  # OpenVINO computes integers in 32 bits
_READABLE = (1, INT32, INT64, 11)


class Value:
    """A tensor of a graph.

    Attributes:
        dtype: ``TensorProto.DataType``.
        shape: Its sizes.
        array: Its content, if it is a constant.
        between: Lowest and highest of places along an axis.
        source: The input of the graph whose integers it holds.
    """

    __slots__ = ("_known", "array", "between", "dtype", "shape", "source")

    def __init__(
        self,
        dtype: int,
        shape: Shape,
        *,
        array: npt.NDArray[Any] | None = None,
        between: tuple[int, int] | None = None,
        source: str = "",
    ) -> None:
        self.dtype, self.shape, self.array, self.source = dtype, shape, array, source
        self.between = between
        self._known: npt.NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """Elements, where sizes that are not known count as one."""
        return math.prod(1 if size is None else size for size in self.shape)

    @property
    def holds_indices(self) -> bool:
        """Whether its numbers matter before a run."""
        return self.array is not None and self.dtype in INTEGERS

    @property
    def known(self) -> npt.NDArray[Any] | None:
        """Its integers as objects, None where one is known only at run time.

        None if they are not known, or too many to be a shape.
        """
        if self._known is None and self.holds_indices and self.size <= _MOST_KNOWN:
            self._known = self.numbers().astype(object)
        return self._known

    @known.setter
    def known(self, numbers: npt.NDArray[Any]) -> None:
        self._known = numbers if numbers.size <= _MOST_KNOWN else None

    def numbers(self) -> npt.NDArray[Any]:
        """The content of a constant of float32, float64, int32 or int64."""
        if self.array is None or self.dtype not in _READABLE:
            raise ValueError("expected a constant of float32, int32 or int64, got a computed value")
        return self.array

    def bounds(self) -> tuple[int, int] | None:
        """Lowest and highest of a constant, or of places along an axis; None of other numbers."""
        if self.between is None and self.holds_indices and self.size:
            found = self.numbers()
            self.between = (int(found.min()), int(found.max()))
        if self.between and -_LARGEST <= self.between[0] <= self.between[1] < _LARGEST:
            return self.between
        return None


class Call:
    """A node with what is known of its inputs."""

    __slots__ = ("attributes", "inputs", "kind", "num_outputs", "opset", "token_rows")

    def __init__(
        self,
        kind: str,
        opset: int,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Any],
        num_outputs: int,
        token_rows: dict[str, int],
    ) -> None:
        self.kind, self.opset, self.inputs = kind, opset, inputs
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
        return default if found is None else str(found.decode("ascii", "replace"))

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
        known = value.known
        if known is None:
            raise ValueError(f"input {index}: expected constants or sizes, got computed numbers")
        return list(known.reshape(-1))


def place(what: str, axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise ValueError(f"{what}: expected one of {rank} axes, got {axis}")
    return axis % rank
