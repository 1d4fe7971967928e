"""Compute networks in NumPy: the definition that their graphs are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from zsseg_rt.onnx.operations import ONNX_TYPES, Array, Operations, Shape, Value

_DTYPES = {number: name for name, number in ONNX_TYPES.items()}


class Arrays(Operations):
    """Every operation is done at once."""

    def apply(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        dtype: str | None = None,
        **attributes: Any,
    ) -> Value:
        """One ONNX operator; shape and dtype follow by themselves."""
        return compute(kind, inputs, attributes)


def compute(kind: str, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Any:
    """The result of one ONNX operator, with the attributes that :class:`Operations` sets."""
    return _FUNCTIONS[kind](*inputs, **attributes)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(x: Array, approximate: bytes = b"none") -> Array:
    if approximate == b"tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (np.float32(0.5) * np.tanh(inner) + np.float32(0.5)))
    erf = np.interp(x * np.float32(0.5**0.5), *_erf_table()).astype(np.float32)
    return np.asarray(x * (np.float32(0.5) * erf + np.float32(0.5)))


@cache
def _erf_table() -> tuple[Array, Array]:
    """Places and values of the error function; straight lines between them are within 1e-8."""
    places = np.linspace(-6, 6, 3 * (1 << 14) + 1)
    return places, np.array([math.erf(place) for place in places])


def _softmax(x: Array, axis: int) -> Array:
    raised = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(raised / raised.sum(axis, keepdims=True))


def _layer_norm(
    x: Array, scale: Array, bias: Array | None = None, *, axis: int, epsilon: float, **_: int
) -> Array:
    centred = x - x.mean(axis, keepdims=True)
    variance = np.square(centred).mean(axis, keepdims=True)
    made = centred / np.sqrt(variance + np.float32(epsilon)) * scale
    return np.asarray(made if bias is None else made + bias)


def _reduced(function: Callable[..., Array]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Array, keepdims: int) -> Array:
        return function(x, axis=tuple(axes), keepdims=bool(keepdims))

    return reduce


def _norm(x: Array, axis: Any, keepdims: bool) -> Array:
    return np.asarray(np.sqrt(np.square(x).sum(axis, keepdims=keepdims)))


def _top_k(x: Array, count: Array, **_: int) -> tuple[Array, Array]:
    places = np.argsort(-x, axis=-1, kind="stable")[..., : int(count[0])]
    return np.take_along_axis(x, places, -1), places


def _conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    group: int,
    **_: Any,
) -> Array:
    batch, pad, stride, (high, wide) = len(x), pads[0], strides[0], weight.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (high, wide), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    rows, columns = windows.shape[2:4]
    cut = windows.reshape(batch, group, -1, rows, columns, high * wide)
    cut = cut.transpose(1, 0, 3, 4, 2, 5).reshape(group, batch * rows * columns, -1)
    made = cut @ weight.reshape(group, len(weight) // group, -1).transpose(0, 2, 1)
    made = made.transpose(1, 0, 2).reshape(batch, rows, columns, -1).transpose(0, 3, 1, 2)
    return made if bias is None else np.asarray(made + bias[:, None, None])


def _conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    **_: Any,
) -> Array:
    (stride, pad), (batch, _, rows, columns) = (strides[0], pads[0]), x.shape
    outputs, high, wide = weight.shape[1:]
    parts = np.tensordot(x, weight, (1, 0)).transpose(4, 5, 0, 3, 1, 2)
    sides = (stride * (rows - 1) + high, stride * (columns - 1) + wide)
    made = np.zeros((batch, outputs, *sides), x.dtype)
    for top, left in np.ndindex(high, wide):
        made[:, :, top::stride, left::stride][:, :, :rows, :columns] += parts[top, left]
    made = made[:, :, pad : sides[0] - pad, pad : sides[1] - pad]
    return made if bias is None else np.asarray(made + bias[:, None, None])


def _max_pool(x: Array, *, kernel_shape: Sequence[int], **settings: Sequence[int]) -> Array:
    (high, wide), stride, pad = kernel_shape, settings["strides"][0], settings["pads"][0]
    sides = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    padded = np.pad(x, sides, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (high, wide), (2, 3))
    return np.asarray(windows[:, :, ::stride, ::stride].max((4, 5)))


def _doubled(x: Array, *_: Array | None, **__: bytes) -> Array:
    """Resize, as :meth:`Operations.double` uses it."""
    return np.asarray(x.repeat(2, 2).repeat(2, 3))


def _slice(x: Array, start: Array, stop: Array, axis: Array) -> Array:
    return np.asarray(x[(slice(None),) * int(axis[0]) + (slice(int(start[0]), int(stop[0])),)])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Equal": np.equal,
    "And": np.logical_and,
    "Where": np.where,
    "Sigmoid": _sigmoid,
    "Gelu": _gelu,
    "Relu": lambda x: np.maximum(x, np.float32(0)),
    "Elu": lambda x, **_: np.where(x > 0, x, np.expm1(np.minimum(x, np.float32(0)))),
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Cast": lambda x, to: x.astype(_DTYPES[to]),
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "ReduceSum": _reduced(np.sum),
    "ReduceMean": _reduced(np.mean),
    "ReduceMax": _reduced(np.max),
    "ReduceL2": _reduced(_norm),
    "TopK": _top_k,
    "ArgMax": lambda x, axis, **_: np.expand_dims(x.argmax(axis), axis),
    "MatMul": np.matmul,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "Resize": _doubled,
    "Reshape": lambda x, sizes, **_: x.reshape(sizes),
    "Transpose": lambda x, perm: np.transpose(x, perm),
    "Slice": _slice,
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Gather": lambda table, rows, axis: np.take(table, rows, axis),
}
