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


def _elementwise(kind: str, **attributes: Any) -> Callable[..., Value]:
    return lambda self, *inputs: self.apply(kind, inputs, **attributes)


def _reduce(kind: str) -> Callable[..., Value]:
    return lambda self, x, *axes: self.apply(kind, (x, integers(*axes)), keepdims=1)


class Operations(ABC):
    """The operations of networks. Axes may count from the end."""

    def __init__(self) -> None:
        self.marks: dict[str, Value] = {}

    @abstractmethod
    def apply(
        self, kind: str, inputs: Inputs, shape: Shape | None = None, **attributes: Any
    ) -> Value:
        """One ONNX operator; ``shape`` names axes of its result that stay open."""

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
    equal = _elementwise("Equal")
    greater = _elementwise("Greater")
    greater_or_equal = _elementwise("GreaterOrEqual")
    both = _elementwise("And")

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        """``a`` where the condition holds, else ``b``."""
        return self.apply("Where", (condition, a, b))

    def gelu(self, x: Value, *, tanh: bool = False) -> Value:
        """``x * (1 + erf(x / sqrt(2))) / 2``; ``tanh`` is its approximation by this function."""
        settings: dict[str, Any] = {"approximate": b"tanh"} if tanh else {}
        return self.apply("Gelu", (x,), **settings)

    def cast(self, x: Value, dtype: str) -> Value:
        """The same numbers as another dtype, by NumPy's name."""
        return self.apply("Cast", (x,), to=ONNX_TYPES[dtype])

    # Along an axis.

    def softmax(self, x: Value) -> Value:
        """Over the last axis."""
        return self.apply("Softmax", (x,), axis=-1)

    def layer_norm(self, x: Value, norm: Norm) -> Value:
        """Over the last axis."""
        scale = np.ones(x.shape[-1], np.float32) if norm.weight is None else norm.weight
        parts = (x, scale) if norm.bias is None else (x, scale, norm.bias)
        settings: dict[str, Any] = {"axis": -1, "epsilon": float(norm.eps), "stash_type": 1}
        return self.apply("LayerNormalization", parts, **settings)

    # Over axes, which stay with size 1; norm is the L2 norm.
    sum, mean = _reduce("ReduceSum"), _reduce("ReduceMean")
    max, norm = _reduce("ReduceMax"), _reduce("ReduceL2")

    def top_k(self, x: Value, count: int) -> tuple[Value, Value]:
        """The largest along the last axis, in falling order: values, and their places as int64."""
        parts = (x, integers(count))
        values, places = self.apply("TopK", parts, axis=-1, largest=1, sorted=1)
        return values, places

    def arg_max(self, x: Value) -> Value:
        """The first place of the largest along the last axis, which stays with size 1; int64."""
        return self.apply("ArgMax", (x,), axis=-1, keepdims=1, select_last_index=0)

    # Products.

    def matmul(self, a: Value, b: Value) -> Value:
        """Products of the last two axes; those before are broadcast."""
        return self.apply("MatMul", (a, b))

    def linear(self, x: Value, linear: Linear, scale: float = 1.0) -> Value:
        """``(x @ weight.T + bias) * scale``."""
        projected = self.matmul(x, linear.weight.T)
        projected = projected if linear.bias is None else self.add(projected, linear.bias)
        return projected if scale == 1 else self.mul(projected, np.float32(scale))

    def conv(
        self, x: Value, linear: Linear, *, stride: int = 1, pad: int = 0, groups: int = 1
    ) -> Value:
        """Convolve [B, C, H, W] with a weight [out, C / groups, h, w]; zeros lie around it."""
        parts = (x, linear.weight) if linear.bias is None else (x, *linear)
        windows = _windows(linear.weight.shape[2:], stride, pad)
        return self.apply("Conv", parts, **windows, group=groups)

    def conv_transpose(self, x: Value, linear: Linear, *, stride: int = 1, pad: int = 0) -> Value:
        """The transpose of :meth:`conv`, of [B, C, H, W] with a weight [C, out, h, w]."""
        parts = (x, linear.weight) if linear.bias is None else (x, *linear)
        windows = _windows(linear.weight.shape[2:], stride, pad)
        return self.apply("ConvTranspose", parts, **windows, group=1)

    def max_pool(self, x: Value, size: int, *, stride: int, pad: int) -> Value:
        """Largest values of square windows of [B, C, H, W]."""
        return self.apply("MaxPool", (x,), **_windows((size, size), stride, pad))

    def double(self, x: Value) -> Value:
        """Every cell of [B, C, H, W] four times, [B, C, 2 H, 2 W]."""
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        rule: dict[str, Any] = {"mode": b"nearest", "nearest_mode": b"floor"}
        rule["coordinate_transformation_mode"] = b"asymmetric"
        return self.apply("Resize", (x, None, None, integers(*shape)), **rule)

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
        return self.apply("Transpose", (x,), perm=list(axes))

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """Places ``start`` to ``stop`` of an axis, both counted from its beginning."""
        axis = axis % len(x.shape)
        return self.apply("Slice", (x, *map(integers, (start, stop, axis))))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """One after another along an axis."""
        return self.apply("Concat", parts, axis=axis % len(parts[0].shape))

    def repeat(self, x: Array, like: Value) -> Value:
        """Of a constant [1, ...], one for each row of another value."""
        rows, sizes = like.shape[0], x.shape[1:]
        if not isinstance(rows, str):
            wide = (rows, *sizes)
            return np.broadcast_to(x, wide) if isinstance(x, np.ndarray) else x.expand(wide)
        count = self.apply("Shape", (like,), start=0, end=1)
        shape = self.concat((count, integers(*sizes)), 0)
        return self.apply("Expand", (x, shape), (rows, *sizes))

    def gather(self, table: Value, rows: Value, axis: int = 0) -> Value:
        """Rows of a table [R, ...] by integers of any shape; or what another axis counts."""
        return self.apply("Gather", (table, rows), axis=axis)


ONNX_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16, "float8_e4m3fn": 17,
}  # fmt: skip
"""Numbers of dtypes in ONNX, ``TensorProto.DataType``."""
DTYPES = {number: name for name, number in ONNX_TYPES.items()}


def integers(*numbers: int) -> Array:
    """Sizes or places as ONNX operators take them, int64 [n]."""
    return np.array(numbers, np.int64)


def dtype_of(x: Value) -> str:
    """NumPy's name of a value's dtype, which may be torch's."""
    return str(x.dtype).removeprefix("torch.")


def _windows(kernel: Sequence[int], stride: int, pad: int) -> dict[str, Any]:
    """How windows lie, as convolutions and poolings say it."""
    return {"kernel_shape": list(kernel), "strides": [stride] * 2, "pads": [pad] * 4}
