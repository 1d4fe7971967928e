"""Compute networks at once, by NumPy or torch: the definition that graphs are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from zsseg_rt.common.arrays import HALF_PRECISIONS, widened_bits
from zsseg_rt.onnx.network import Network, Weight
from zsseg_rt.onnx.operations import ONNX_TYPES, Array, Inputs, Operations, Shape, Value
from zsseg_rt.onnx.runs import Windows
from zsseg_rt.onnx.table import OPERATORS, newest


class Numpy:
    """NumPy's functions, and what NumPy lacks; what is not here is NumPy's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def holds(self, value: Any) -> bool:
        return isinstance(value, (np.ndarray, np.generic))

    def asarray(self, value: Any, like: Any = None) -> Array:
        """The value as an array, where the other one is."""
        return np.asarray(value)

    def is_float(self, x: Array) -> bool:
        return x.dtype.kind == "f"

    def dtype_name(self, x: Array) -> str:
        return x.dtype.name

    def cast(self, x: Array, dtype: str) -> Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(x.astype(dtype))

    concat, take_along = staticmethod(np.concatenate), staticmethod(np.take_along_axis)
    permute, unsqueeze = staticmethod(np.transpose), staticmethod(np.expand_dims)

    def order(self, x: Array, axis: int, *, descending: bool) -> Array:
        """Places in sorted order; of equal values the first comes first."""
        return np.argsort(-x if descending else x, axis=axis, kind="stable")

    def pad(self, x: Array, each: Sequence[tuple[int, int]], value: Any) -> Array:
        """One value around axes; below 0, rows are cut off."""
        x = x[tuple(slice(-min(a, 0), min(b, 0) or None) for a, b in each)]
        return np.pad(x, [(max(a, 0), max(b, 0)) for a, b in each], constant_values=value)

    def relu(self, x: Array) -> Array:
        return np.asarray(np.maximum(x, x.dtype.type(0)))

    def sigmoid(self, x: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-x)))

    def erf(self, x: Array) -> Array:
        """The error function, linear between places that lie close: within 1e-8."""
        numbers, result, table = x.reshape(-1), np.empty(x.size, x.dtype), _erf_table(x.dtype)
        for start in range(0, x.size, _ERF_PART):
            part = slice(start, start + _ERF_PART)
            steps = np.clip(numbers[part], -6, 6) * x.dtype.type(_ERF_RATE)
            below = np.floor(steps)
            with np.errstate(invalid="ignore"):  # NaN stays NaN, wherever it is looked up
                at = below.astype(np.intp) + 6 * _ERF_RATE
            first = table.take(at, mode="clip")
            way = (table.take(at + 1, mode="clip") - first) * (steps - below)
            result[part] = first + way
        return result.reshape(x.shape)

    def gelu(self, x: Array, approximate: str) -> Array:
        """``x * (1 + erf(x / sqrt(2))) / 2``, or its approximation by tanh."""
        if approximate == "tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
            return np.asarray(0.5 * x * (1 + np.tanh(inner)))
        half = np.float32(0.5)
        return np.asarray(x * (half * self.erf(x * np.float32(0.5**0.5)) + half))

    def matmul(self, a: Array, b: Array) -> Array:
        """Products; rows of all batches meet one matrix in one product, as it is read once."""
        if b.ndim == 2 < a.ndim:
            return np.asarray((a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[1]))
        return np.asarray(np.matmul(a, b))

    def softmax(self, x: Array, axis: int) -> Array:
        raised = x - x.max(axis, keepdims=True)
        np.exp(raised, out=raised)  # in place, as attention's scores are large
        raised /= raised.sum(axis, keepdims=True)
        return np.asarray(raised)

    def norm(self, x: Array, axis: Any, keepdims: bool) -> Array:
        return np.asarray(np.sqrt(np.square(x).sum(axis, keepdims=keepdims)))

    def layer_norm(
        self, x: Array, axis: int, scale: Array, bias: Array | None, eps: float
    ) -> Array:
        """Over an axis and those behind it."""
        normed = _normalised(x, tuple(range(axis, x.ndim)), eps) * scale
        return np.asarray(normed if bias is None else normed + bias)

    def group_norm(self, x: Array, groups: int, scale: Array, bias: Array, eps: float) -> Array:
        """Over groups of channels and all places of an image."""
        normed = _normalised(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)
        shape = [-1] + [1] * (x.ndim - 2)
        return np.asarray(normed * scale.reshape(shape) + bias.reshape(shape))

    def conv(self, x: Array, weight: Array, bias: Array | None, lie: Windows, groups: int) -> Array:
        """Images of any rank; zeros lie around them."""
        windows = _views(self.pad(x, [(0, 0), (0, 0), *lie.around], 0), lie)
        places = windows.shape[2 : x.ndim]
        batch, count = len(x), math.prod(places)
        cut = windows.reshape(batch, groups, -1, count, math.prod(lie.kernel))
        cut = cut.transpose(1, 0, 3, 2, 4).reshape(groups, batch * count, -1)
        products = cut @ weight.reshape(groups, len(weight) // groups, -1).transpose(0, 2, 1)
        image = products.transpose(1, 0, 2).reshape(batch, *places, -1)
        return np.moveaxis(image if bias is None else image + bias, -1, 1)

    def conv_transpose(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        lie: Windows,
        more: Sequence[int],
        groups: int,
    ) -> Array:
        """A convolution of the image with zeros between its places, by the turned weight."""
        rank = x.ndim - 2
        sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], lie.strides, strict=True)]
        spread = np.zeros((*x.shape[:2], *sizes), x.dtype)
        places: Any = (..., *(slice(None, None, step) for step in lie.strides))
        spread[places] = x
        cut = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        turned = np.flip(cut, tuple(range(3, 3 + rank))).reshape(-1, *cut.shape[2:])
        outside = [
            (reach - 1 - before, reach - 1 - after + extra)
            for reach, (before, after), extra in zip(lie.reach, lie.around, more, strict=True)
        ]
        lie = lie._replace(strides=[1] * rank, around=outside)
        return self.conv(spread, turned, bias, lie, groups)

    def max_pool(self, x: Array, lie: Windows) -> Array:
        return np.asarray(_views(x, lie).max(tuple(range(2 - x.ndim, 0))))

    def mean_pool(self, x: Array, lie: Windows) -> Array:
        return np.asarray(_views(x, lie).mean(tuple(range(2 - x.ndim, 0))))

    def keep(self, array: Array, device: Any) -> Array:
        """The array where the device's values are."""
        return array


NUMPY = Numpy()


class Arrays(Operations):
    """Every operation is done at once."""

    def __init__(self, xp: Any = NUMPY) -> None:
        super().__init__()
        self.xp = xp

    def apply(
        self, kind: str, inputs: Inputs, shape: Shape | None = None, **attributes: Any
    ) -> Value:
        """One ONNX operator; shapes follow by themselves."""
        return compute(kind, inputs, attributes, self.xp)


def compute(
    kind: str, inputs: Sequence[Any], attributes: Mapping[str, Any], xp: Any = NUMPY
) -> Any:
    """The result of one ONNX operator, or several; by NumPy where no input is torch's."""
    operator = OPERATORS[kind]
    if operator.run is None:
        raise ValueError(f"expected an operator that NumPy and torch have, got {kind!r}")
    if xp is not NUMPY:
        first = next((each for each in inputs if xp.holds(each)), None)
        if first is None:
            xp = NUMPY
        else:
            inputs = [
                each if each is None or at >= operator.host else xp.asarray(each, first)
                for at, each in enumerate(inputs)
            ]
    return operator.run(xp, *inputs, **attributes)


def run_network(network: Network, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs of a graph by name; half precision is computed in float32."""
    values, outputs = dict(feeds), {spec.name for spec in network.outputs}
    nodes = [newest(node, network.opset) for node in network.nodes]
    readers = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    halves = [ONNX_TYPES[name] for name in HALF_PRECISIONS]
    for index, node in enumerate(nodes):
        inputs = [
            values[name] if name in values else _widened(network.weights[name]) if name else None
            for name in node.inputs
        ]
        attributes = dict(node.attributes)
        if node.kind == "Cast" and attributes["to"] in halves:
            attributes["to"] = ONNX_TYPES["float32"]
        results = compute(node.kind, inputs, attributes)
        values.update(
            zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
        )
        for name in node.inputs:
            if readers[name] == index and name not in outputs:
                values.pop(name, None)
    return {name: values[name] for name in outputs}


def _widened(weight: Weight) -> Array:
    if weight.dtype == "bfloat16":
        return widened_bits(weight.array)
    return weight.array.astype(np.float32) if weight.dtype == "float16" else weight.array


_ERF_RATE = 4096  # places per unit
_ERF_PART = 1 << 15  # numbers that stay in a cache: a third of the time


@cache
def _erf_table(dtype: np.dtype[Any]) -> Array:
    places = np.arange(-6 * _ERF_RATE, 6 * _ERF_RATE + 2) / _ERF_RATE
    return np.array([math.erf(place) for place in places], dtype)


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + np.float32(eps)))


def _views(x: Array, lie: Windows) -> Array:
    """Views [B, C, places..., kernel...] of all windows."""
    windows = np.lib.stride_tricks.sliding_window_view(x, lie.reach, tuple(range(2, x.ndim)))
    steps = [slice(None, None, step) for step in (*lie.strides, *lie.dilations)]
    return np.asarray(windows[(slice(None), slice(None), *steps)])
