"""The operations that networks are made of.

A network is a function of an :class:`Operations` and of arrays:
:class:`zsseg_rt.onnx.arrays.Arrays` computes it, :class:`zsseg_rt.onnx.graph.Graph` writes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Value = Any
"""An array, or a value that a graph will compute; both have ``shape`` and ``dtype``."""
Inputs = Sequence[Value]
Shape = tuple[Any, ...]
"""Sizes; a word is an axis that stays open until the graph runs."""


class Norm(NamedTuple):
    """Scale, shift and epsilon of a layer norm over the last axis; None leaves one out."""

    weight: Array | None
    bias: Array | None
    eps: float = 1e-5


class Linear(NamedTuple):
    """A projection, ``weight`` [out, in] and ``bias`` [out]."""

    weight: Array
    bias: Array | None = None


def _elementwise(kind: str, dtype: str | None = None, **attributes: Any) -> Callable[..., Value]:
    def method(self: Operations, *inputs: Value) -> Value:
        return self.apply(kind, inputs, broadcast(*inputs), dtype, **attributes)

    return method


def _reduce(kind: str) -> Callable[..., Value]:
    def method(self: Operations, x: Value, *axes: int) -> Value:
        places = [axis % len(x.shape) for axis in axes]
        shape = tuple(1 if axis in places else size for axis, size in enumerate(x.shape))
        return self.apply(kind, (x, integers(*axes)), shape, keepdims=1)

    return method


class Operations(ABC):
    """The operations of networks. Axes may count from the end."""

    def __init__(self) -> None:
        self.marks: dict[str, Value] = {}

    @abstractmethod
    def apply(
        self, kind: str, inputs: Inputs, shape: Shape, dtype: str | None = None, **attributes: Any
    ) -> Value:
        """One ONNX operator with one result of this shape; its dtype is the first input's."""

    @contextmanager
    def at(self, scope: str) -> Iterator[None]:
        """Name what is written inside after a part of the network, such as ``blocks.3``."""
        yield

    def mark(self, name: str, x: Value) -> Value:
        """Remember a stage under a name, so that two ways to compute it can be compared."""
        self.marks[name] = x
        return x

    def fold_norm(self, norm: Norm, linears: Sequence[Linear]) -> tuple[Norm, list[Linear]]:
        """A norm and the projections behind it, as they are; a graph may join them."""
        return norm, list(linears)

    # Number by number; shapes are broadcast, and comparisons are booleans.

    add, sub, mul, div = map(_elementwise, ("Add", "Sub", "Mul", "Div"))
    maximum, relu, sigmoid = map(_elementwise, ("Max", "Relu", "Sigmoid"))
    exp, sqrt = map(_elementwise, ("Exp", "Sqrt"))
    elu = _elementwise("Elu", alpha=1.0)
    equal = _elementwise("Equal", "bool")
    greater = _elementwise("Greater", "bool")
    greater_or_equal = _elementwise("GreaterOrEqual", "bool")
    both = _elementwise("And", "bool")

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        """``a`` where the condition holds, else ``b``."""
        return self.apply("Where", (condition, a, b), broadcast(condition, a, b), dtype_of(a))

    def gelu(self, x: Value, *, tanh: bool = False) -> Value:
        """``x * (1 + erf(x / sqrt(2))) / 2``; ``tanh`` is its approximation by this function."""
        settings: dict[str, Any] = {"approximate": b"tanh"} if tanh else {}
        return self.apply("Gelu", (x,), x.shape, **settings)

    def cast(self, x: Value, dtype: str) -> Value:
        """The same numbers as another dtype, by NumPy's name."""
        return self.apply("Cast", (x,), x.shape, dtype, to=ONNX_TYPES[dtype])

    # Along an axis.

    def softmax(self, x: Value) -> Value:
        """Over the last axis."""
        return self.apply("Softmax", (x,), x.shape, axis=-1)

    def layer_norm(self, x: Value, norm: Norm) -> Value:
        """Over the last axis."""
        scale = np.ones(x.shape[-1], np.float32) if norm.weight is None else norm.weight
        parts = (x, scale) if norm.bias is None else (x, scale, norm.bias)
        settings: dict[str, Any] = {"axis": -1, "epsilon": float(norm.eps), "stash_type": 1}
        return self.apply("LayerNormalization", parts, x.shape, **settings)

    # Over axes, which stay with size 1; norm is the L2 norm.
    sum, mean = _reduce("ReduceSum"), _reduce("ReduceMean")
    max, norm = _reduce("ReduceMax"), _reduce("ReduceL2")

    def top_k(self, x: Value, count: int) -> tuple[Value, Value]:
        """The largest along the last axis, in falling order: values, and their places as int64."""
        shape = (*x.shape[:-1], count)
        settings: dict[str, Any] = {"axis": -1, "largest": 1, "sorted": 1}
        results = self.apply("TopK", (x, integers(count)), shape, **settings)
        return results[0], results[1]

    def arg_max(self, x: Value) -> Value:
        """The first place of the largest along the last axis, which stays with size 1; int64."""
        shape = (*x.shape[:-1], 1)
        settings: dict[str, Any] = {"axis": -1, "keepdims": 1, "select_last_index": 0}
        return self.apply("ArgMax", (x,), shape, "int64", **settings)

    # Products.

    def matmul(self, a: Value, b: Value) -> Value:
        """Products of the last two axes; those before are broadcast."""
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"a product of {a.shape} and {b.shape}")
        shape = (*_joined(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return self.apply("MatMul", (a, b), shape)

    def linear(self, x: Value, linear: Linear, scale: float = 1.0) -> Value:
        """``(x @ weight.T + bias) * scale``."""
        projected = self.matmul(x, linear.weight.T)
        projected = projected if linear.bias is None else self.add(projected, linear.bias)
        return projected if scale == 1 else self.mul(projected, np.float32(scale))

    def conv(
        self, x: Value, linear: Linear, *, stride: int = 1, pad: int = 0, groups: int = 1
    ) -> Value:
        """Convolve [B, C, H, W] with a weight [out, C / groups, h, w]; zeros lie around it."""
        kernel = linear.weight.shape[2:]
        sides = [
            (side + 2 * pad - size) // stride + 1
            for side, size in zip(x.shape[2:], kernel, strict=True)
        ]
        parts = (x, linear.weight) if linear.bias is None else (x, *linear)
        shape = (x.shape[0], len(linear.weight), *sides)
        return self.apply("Conv", parts, shape, **_windows(kernel, stride, pad), group=groups)

    def conv_transpose(self, x: Value, linear: Linear, *, stride: int = 1, pad: int = 0) -> Value:
        """The transpose of :meth:`conv`, of [B, C, H, W] with a weight [C, out, h, w]."""
        kernel = linear.weight.shape[2:]
        sides = [
            (side - 1) * stride + size - 2 * pad
            for side, size in zip(x.shape[2:], kernel, strict=True)
        ]
        parts = (x, linear.weight) if linear.bias is None else (x, *linear)
        shape = (x.shape[0], linear.weight.shape[1], *sides)
        return self.apply("ConvTranspose", parts, shape, **_windows(kernel, stride, pad), group=1)

    def max_pool(self, x: Value, size: int, *, stride: int, pad: int) -> Value:
        """Largest values of square windows of [B, C, H, W]."""
        sides = [(side + 2 * pad - size) // stride + 1 for side in x.shape[2:]]
        return self.apply(
            "MaxPool", (x,), (*x.shape[:2], *sides), **_windows((size, size), stride, pad)
        )

    def double(self, x: Value) -> Value:
        """Every cell of [B, C, H, W] four times, [B, C, 2 H, 2 W]."""
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        rule: dict[str, Any] = {"mode": b"nearest", "nearest_mode": b"floor"}
        rule["coordinate_transformation_mode"] = b"asymmetric"
        return self.apply("Resize", (x, None, None, integers(*shape)), shape, **rule)

    # Moves.

    def reshape(self, x: Value, shape: Shape) -> Value:
        """The same values in other axes; open ones stay where they are, but for one."""
        staying = [isinstance(a, str) and a == b for a, b in zip(shape, x.shape, strict=False)]
        staying += [False] * (len(shape) - len(staying))
        sizes = integers(
            *(
                0 if stays else -1 if isinstance(size, str) else size
                for size, stays in zip(shape, staying, strict=True)
            )
        )
        return self.apply("Reshape", (x, sizes), tuple(shape), allowzero=0)

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        """Axes in another order."""
        shape = tuple(x.shape[axis] for axis in axes)
        return self.apply("Transpose", (x,), shape, perm=list(axes))

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """Places ``start`` to ``stop`` of an axis, both counted from its beginning."""
        axis = axis % len(x.shape)
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        return self.apply("Slice", (x, *map(integers, (start, stop, axis))), shape)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """One after another along an axis."""
        first, axis = parts[0].shape, axis % len(parts[0].shape)
        size = sum(part.shape[axis] for part in parts)
        return self.apply("Concat", parts, (*first[:axis], size, *first[axis + 1 :]), axis=axis)

    def repeat(self, x: Array, like: Value) -> Value:
        """Of a constant [1, ...], one for each row of another value."""
        rows, sizes = like.shape[0], x.shape[1:]
        if not isinstance(rows, str):
            wide = (rows, *sizes)
            return np.broadcast_to(x, wide) if isinstance(x, np.ndarray) else x.expand(wide)
        count = self.apply("Shape", (like,), (1,), "int64", start=0, end=1)
        shape = self.concat((count, integers(*sizes)), 0)
        return self.apply("Expand", (x, shape), (rows, *sizes))

    def gather(self, table: Value, rows: Value, axis: int = 0) -> Value:
        """Rows of a table [R, ...] by integers of any shape; or what another axis counts."""
        shape = (*table.shape[:axis], *rows.shape, *table.shape[axis + 1 :])
        return self.apply("Gather", (table, rows), shape, axis=axis)


ONNX_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16, "float8_e4m3fn": 17,
}  # fmt: skip
"""Numbers of dtypes in ONNX, ``TensorProto.DataType``."""


def integers(*numbers: int) -> Array:
    """Sizes or places as ONNX operators take them, int64 [n]."""
    return np.array(numbers, np.int64)


def dtype_of(x: Value) -> str:
    """NumPy's name of a value's dtype, which may be torch's."""
    return str(x.dtype).removeprefix("torch.")


def broadcast(*values: Value) -> Shape:
    """The shape that values together have."""
    shape: Shape = ()
    for value in values:
        shape = _joined(shape, value.shape)
    return shape


def _windows(kernel: Sequence[int], stride: int, pad: int) -> dict[str, Any]:
    """How windows lie, as convolutions and poolings say it."""
    return {"kernel_shape": list(kernel), "strides": [stride] * 2, "pads": [pad] * 4}


def _joined(a: Shape, b: Shape) -> Shape:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    shorter = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
    for one, other in zip(longer, shorter, strict=True):
        if one != other and 1 not in (one, other):
            raise ValueError(f"shapes {a} and {b} together")
    return tuple(y if x == 1 else x for x, y in zip(longer, shorter, strict=True))
