"""What each ONNX operator computes: ``run(xp, *inputs, **attributes)``.

``xp`` computes: :class:`zsseg_rt.onnx.arrays.Numpy`, or the same over torch. Sizes and axes are
NumPy's or lists, on the host, whatever ``xp`` is. Attributes are called as ONNX calls them, and
have its defaults.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zsseg_rt.onnx.operations import ONNX_TYPES

Run = Callable[..., Any]
_DTYPES = {number: name for name, number in ONNX_TYPES.items()}


def plain(name: str) -> Run:
    """A function that is called alike in NumPy and torch."""
    return lambda xp, *inputs, **_: getattr(xp, name)(*inputs)


def joined(name: str) -> Run:
    """A function of two, over any number of inputs."""
    return lambda xp, *inputs: functools.reduce(getattr(xp, name), inputs)


def numbers(given: Any) -> list[int]:
    """Sizes or axes as a list; none of nothing."""
    return [] if given is None else [int(number) for number in np.asarray(given).reshape(-1)]


def text(given: bytes | str) -> str:
    """A text attribute."""
    return given.decode() if isinstance(given, bytes) else given


# --- number by number ---


def divide(xp: Any, a: Any, b: Any) -> Any:
    """Integers are cut towards zero."""
    return a / b if xp.is_float(a) else xp.sign(a) * (abs(a) // b)


def mean(xp: Any, *inputs: Any) -> Any:
    return functools.reduce(xp.add, inputs) / len(inputs)


def modulo(xp: Any, a: Any, b: Any, fmod: int = 0) -> Any:
    return xp.fmod(a, b) if fmod else xp.remainder(a, b)


def power(xp: Any, a: Any, b: Any) -> Any:
    return xp.cast(a**b, xp.dtype_name(a))


def clip(xp: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if low is None and high is None:
        return x
    bounds = [each.item() if isinstance(each, np.ndarray) else each for each in (low, high)]
    return xp.clip(x, *bounds)


def cast(xp: Any, x: Any, to: int, saturate: int = 1) -> Any:
    return xp.cast(x, _DTYPES[to])


def cast_like(xp: Any, x: Any, like: Any, saturate: int = 1) -> Any:
    return xp.cast(x, xp.dtype_name(like))


def celu(xp: Any, x: Any, alpha: float = 1.0) -> Any:
    return xp.clip(x, 0, None) + alpha * xp.expm1(xp.clip(x, None, 0) / alpha)


def elu(xp: Any, x: Any, alpha: float = 1.0) -> Any:
    return xp.where(x > 0, x, alpha * xp.expm1(xp.clip(x, None, 0)))


def selu(
    xp: Any, x: Any, alpha: float = 1.67326319217681884, gamma: float = 1.05070102214813232
) -> Any:
    return gamma * elu(xp, x, alpha)


def hard_sigmoid(xp: Any, x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return xp.clip(alpha * x + beta, 0, 1)


def hard_swish(xp: Any, x: Any) -> Any:
    return x * hard_sigmoid(xp, x, 1 / 6)


def leaky_relu(xp: Any, x: Any, alpha: float = 0.01) -> Any:
    return xp.where(x < 0, alpha * x, x)


def prelu(xp: Any, x: Any, slope: Any) -> Any:
    return xp.where(x < 0, slope * x, x)


def softplus(xp: Any, x: Any) -> Any:
    return xp.clip(x, 0, None) + xp.log1p(xp.exp(-abs(x)))


def mish(xp: Any, x: Any) -> Any:
    return x * xp.tanh(softplus(xp, x))


def softsign(xp: Any, x: Any) -> Any:
    return x / (1 + abs(x))


def swish(xp: Any, x: Any, alpha: float = 1.0) -> Any:
    return x * xp.sigmoid(alpha * x)


def thresholded_relu(xp: Any, x: Any, alpha: float = 1.0) -> Any:
    return xp.where(x > alpha, x, 0 * x)


def gelu(xp: Any, x: Any, approximate: bytes = b"none") -> Any:
    return xp.gelu(x, text(approximate))


# --- along axes ---


def softmax(xp: Any, x: Any, axis: int = -1, flattened: int = 0) -> Any:
    if flattened:
        return xp.softmax(flatten(xp, x, axis), -1).reshape(x.shape)
    return xp.softmax(x, axis)


def log_softmax(xp: Any, x: Any, axis: int = -1, flattened: int = 0) -> Any:
    if flattened:
        return log_softmax(xp, flatten(xp, x, axis)).reshape(x.shape)
    return x - _log_sum_exp(xp, x, (axis,), True)


def _log_sum_exp(xp: Any, x: Any, axis: Any, keepdims: bool) -> Any:
    largest = xp.amax(x, axis=axis, keepdims=True)
    found = xp.log(xp.sum(xp.exp(x - largest), axis=axis, keepdims=True)) + largest
    return found if keepdims else xp.sum(found, axis=axis, keepdims=False)


def _product(xp: Any, x: Any, axis: Sequence[int], keepdims: bool) -> Any:
    for place in sorted((each % x.ndim for each in axis), reverse=True):
        x = xp.prod(x, axis=place, keepdims=keepdims)
    return x


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceL1": lambda xp, x, **along: xp.sum(abs(x), **along),
    "ReduceL2": lambda xp, x, **along: xp.norm(x, **along),
    "ReduceLogSum": lambda xp, x, **along: xp.log(xp.sum(x, **along)),
    "ReduceLogSumExp": lambda xp, x, axis, keepdims: _log_sum_exp(xp, x, axis, keepdims),
    "ReduceMax": lambda xp, x, **along: xp.amax(x, **along),
    "ReduceMean": lambda xp, x, **along: xp.mean(x, **along),
    "ReduceMin": lambda xp, x, **along: xp.amin(x, **along),
    "ReduceProd": _product,
    "ReduceSum": lambda xp, x, **along: xp.sum(x, **along),
    "ReduceSumSquare": lambda xp, x, **along: xp.sum(x * x, **along),
}


def reduction(kind: str) -> Run:
    """``ReduceMax`` and the like."""

    def run(
        xp: Any, x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Any:
        if not numbers(axes) and noop_with_empty_axes:
            return x
        along = tuple(numbers(axes) or range(x.ndim))
        return _REDUCTIONS[kind](xp, x, axis=along, keepdims=bool(keepdims))

    return run


def lp_norm(xp: Any, x: Any, axis: int = -1, p: int = 2) -> Any:
    kind = "ReduceL1" if p == 1 else "ReduceL2"
    return x / _REDUCTIONS[kind](xp, x, axis=(axis,), keepdims=True)


def largest(sign: int) -> Run:
    """``ArgMax``, or ``ArgMin`` if the sign is -1."""

    def run(xp: Any, x: Any, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
        x = xp.flip(x, (axis,)) if select_last_index else x
        places = (xp.argmax if sign > 0 else xp.argmin)(x, axis)
        places = x.shape[axis] - 1 - places if select_last_index else places
        return xp.unsqueeze(places, axis) if keepdims else places

    return run


def top_k(
    xp: Any, x: Any, count: Any, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Any, Any]:
    places = xp.order(x, axis, descending=bool(largest))
    places = _slice_one(xp, places, axis % x.ndim, range(numbers(count)[0]))
    return xp.take_along(x, places, axis), places


def cumsum(xp: Any, x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> Any:
    along = numbers(axis)[0]
    x = xp.flip(x, (along,)) if reverse else x
    total = xp.cumsum(x, along)
    total = total - x if exclusive else total
    return xp.flip(total, (along,)) if reverse else total


def trilu(xp: Any, x: Any, offset: Any = 0, upper: int = 1) -> Any:
    return (xp.triu if upper else xp.tril)(x, numbers(offset)[0])


# --- elements that move ---


def reshape(xp: Any, x: Any, shape: Any, allowzero: int = 0) -> Any:
    sizes = numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(xp: Any, x: Any, axis: int = 1) -> Any:
    axis = axis if axis >= 0 else axis + x.ndim
    return x.reshape([math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def transpose(xp: Any, x: Any, perm: Sequence[int] | None = None) -> Any:
    return xp.permute(x, tuple(range(x.ndim)[::-1] if perm is None else perm))


def squeeze(xp: Any, x: Any, axes: Any = None) -> Any:
    dropped = {axis % x.ndim for axis in numbers(axes)} if axes is not None else None
    return x.reshape(
        [
            size
            for axis, size in enumerate(x.shape)
            if (size != 1 if dropped is None else axis not in dropped)
        ]
    )


def unsqueeze(xp: Any, x: Any, axes: Any) -> Any:
    shape, rank = list(x.shape), x.ndim + len(numbers(axes))
    for axis in sorted(axis % rank for axis in numbers(axes)):
        shape.insert(axis, 1)
    return x.reshape(shape)


def concat(xp: Any, *parts: Any, axis: int) -> Any:
    return xp.concat(parts, axis)


def split(
    xp: Any, x: Any, split: Any = None, axis: int = 0, num_outputs: int = 1
) -> tuple[Any, ...]:
    """Without sizes, into ``num_outputs`` parts of which the last may be smaller."""
    size = x.shape[axis]
    whole = -(-size // num_outputs)
    sizes = numbers(split) or [min(whole, size - at) for at in range(0, size, whole)]
    starts = np.cumsum([0, *sizes]).tolist()
    spans = map(range, starts, starts[1:])
    return tuple(_slice_one(xp, x, axis % x.ndim, span) for span in spans)


def slice_(xp: Any, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    first = numbers(starts)
    along = range(len(first)) if axes is None else numbers(axes)
    by = [1] * len(first) if steps is None else numbers(steps)
    for start, end, axis, step in zip(first, numbers(ends), along, by, strict=True):
        span = range(*slice(start, end, step).indices(x.shape[axis]))
        x = _slice_one(xp, x, axis % x.ndim, span)
    return x


def _slice_one(xp: Any, x: Any, axis: int, span: range) -> Any:
    """Evenly spaced places of an axis: a view, where they ascend."""
    up = span if span.step > 0 else span[::-1]
    part = x[(slice(None),) * axis + (slice(up.start, up.stop, up.step),)]
    return part if span.step > 0 else xp.flip(part, (axis,))


def gather(xp: Any, x: Any, indices: Any, axis: int = 0) -> Any:
    axis = axis % x.ndim
    size = x.shape[axis]
    if isinstance(indices, (np.ndarray, np.generic)):  # on the host: looked at, perhaps a view
        if indices.size and not -size <= indices.min() <= indices.max() < size:
            raise IndexError(f"expected indices from {-size} to {size - 1}, got {indices}")
        if indices.ndim == 0:
            return x[(slice(None),) * axis + (int(indices),)]
        first = int(indices.flat[0]) if indices.size else 0
        last = first + indices.size - 1
        if indices.ndim == 1 and (first >= 0 or last < 0) and np.all(np.diff(indices) == 1):
            first = first % size
            return _slice_one(xp, x, axis, range(first, first + indices.size))
    return xp.take(x, indices, axis)


def gather_elements(xp: Any, x: Any, indices: Any, axis: int = 0) -> Any:
    return xp.take_along(x, indices, axis)


def gather_nd(xp: Any, x: Any, indices: Any, batch_dims: int = 0) -> Any:
    if batch_dims:
        raise ValueError(f"batch_dims: expected 0, got {batch_dims}")
    return x[tuple(indices[..., place] for place in range(indices.shape[-1]))]


def one_hot(xp: Any, indices: Any, depth: Any, values: Any, axis: int = -1) -> Any:
    count = numbers(depth)[0]
    axis = axis % (indices.ndim + 1)
    shape = [1] * axis + [count] + [1] * (indices.ndim - axis)
    places = xp.asarray(np.arange(count).reshape(shape), indices)
    is_place = xp.unsqueeze(xp.remainder(indices, count), axis) == places
    return xp.where(is_place, values[1], values[0])


def expand(xp: Any, x: Any, shape: Any) -> Any:
    return xp.broadcast_to(x, np.broadcast_shapes(tuple(x.shape), tuple(numbers(shape))))


def tile(xp: Any, x: Any, repeats: Any) -> Any:
    return xp.tile(x, tuple(numbers(repeats)))


def pad(
    xp: Any, x: Any, pads: Any, value: Any = None, axes: Any = None, mode: bytes = b"constant"
) -> Any:
    along = [axis % x.ndim for axis in numbers(axes)] or list(range(x.ndim))
    around = numbers(pads)
    each = [(0, 0)] * x.ndim
    for axis, before, after in zip(along, around, around[len(along) :], strict=False):
        each[axis] = (before, after)
    if text(mode) == "constant":
        return xp.pad(x, each, 0 if value is None else value)
    for axis, (before, after) in enumerate(each):
        places = np.pad(np.arange(x.shape[axis]), (before, after), mode=text(mode))  # type: ignore[call-overload]
        x = xp.take(x, places, axis) if before or after else x
    return x


def depth_to_space(xp: Any, x: Any, blocksize: int, mode: bytes = b"DCR") -> Any:
    batch, channels, height, width = x.shape
    if text(mode) == "DCR":
        cut = x.reshape([batch, blocksize, blocksize, -1, height, width])
        cut = xp.permute(cut, (0, 3, 4, 1, 5, 2))
    else:
        cut = x.reshape([batch, -1, blocksize, blocksize, height, width])
        cut = xp.permute(cut, (0, 1, 4, 2, 5, 3))
    return cut.reshape([batch, channels // blocksize**2, height * blocksize, width * blocksize])


def space_to_depth(xp: Any, x: Any, blocksize: int) -> Any:
    batch, _, height, width = x.shape
    rows, columns = height // blocksize, width // blocksize
    cut = x.reshape([batch, -1, rows, blocksize, columns, blocksize])
    return xp.permute(cut, (0, 3, 5, 1, 2, 4)).reshape([batch, -1, rows, columns])


def shape(xp: Any, x: Any, start: int = 0, end: int | None = None) -> Any:
    return np.array(tuple(x.shape)[slice(start, end)], np.int64)


def size(xp: Any, x: Any) -> Any:
    return np.array(math.prod(x.shape), np.int64)


def constant(xp: Any, **values: Any) -> Any:
    (given,) = values.values()
    if isinstance(given, (int, float, list)):
        kind = np.int64 if next(iter(values)).startswith("value_int") else np.float32
        return np.array(given, kind)
    return getattr(given, "array", given)


def constant_of_shape(xp: Any, sizes: Any, value: Any = None) -> Any:
    fill = np.zeros(1, np.float32) if value is None else getattr(value, "array", value)
    return np.full(numbers(sizes), fill.reshape(()))


def range_(xp: Any, start: Any, limit: Any, step: Any) -> Any:
    begin, end, by = (np.asarray(each).item() for each in (start, limit, step))
    kind: Any = np.asarray(start).dtype
    count = max(0, math.ceil((end - begin) / by))
    return (begin + np.arange(count) * by).astype(kind)


def dropout(xp: Any, x: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return x, x == x


# --- products, windows, norms ---


def gemm(
    xp: Any,
    a: Any,
    b: Any,
    c: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Any:
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def einsum(xp: Any, *inputs: Any, equation: bytes) -> Any:
    return xp.einsum(text(equation).replace(" ", ""), *inputs)


def attention(
    xp: Any, q: Any, k: Any, v: Any, mask: Any = None, is_causal: int = 0, scale: float = 0.0
) -> Any:
    if is_causal:
        raise ValueError("is_causal: expected 0, got 1")
    scores = q @ xp.permute(k, (0, 1, 3, 2)) * (scale or q.shape[-1] ** -0.5)
    return xp.softmax(scores if mask is None else scores + mask, -1) @ v


def _around(
    x: Any, kernel: Sequence[int], given: dict[str, Any], dilations: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Strides of windows over an image, and the zeros around its axes."""
    rank = len(kernel)
    strides = given.get("strides") or [1] * rank
    pads, mode = given.get("pads") or [0] * 2 * rank, text(given.get("auto_pad", b"NOTSET"))
    around = list(zip(pads[:rank], pads[rank:], strict=True))
    if mode.startswith("SAME"):
        around = []
        for size, reach, stride, dilation in zip(
            x.shape[2:], kernel, strides, dilations, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (reach - 1) * dilation + 1 - size, 0)
            small, large = total // 2, total - total // 2
            around.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return strides, around


def conv(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, dilations: Any = None, group: int = 1,
    **given: Any,
) -> Any:  # fmt: skip
    kernel = weight.shape[2:]
    dilations = dilations or [1] * len(kernel)
    strides, around = _around(x, kernel, given, dilations)
    return xp.conv(x, weight, bias, strides, around, dilations, group)


def conv_transpose(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, dilations: Any = None, group: int = 1,
    output_padding: Any = None, **given: Any,
) -> Any:  # fmt: skip
    rank = len(weight.shape) - 2
    if text(given.get("auto_pad", b"NOTSET")) != "NOTSET":
        raise ValueError("auto_pad: expected stated pads")
    strides, around = _around(x, weight.shape[2:], given, [1] * rank)
    more = output_padding or [0] * rank
    return xp.conv_transpose(x, weight, bias, strides, around, more, dilations or [1] * rank, group)


def max_pool(
    xp: Any, x: Any, kernel_shape: Sequence[int], dilations: Any = None, ceil_mode: int = 0,
    storage_order: int = 0, **given: Any,
) -> Any:  # fmt: skip
    dilations = dilations or [1] * len(kernel_shape)
    strides, around = _around(x, kernel_shape, given, dilations)
    around = _with_last(x, kernel_shape, strides, around, dilations) if ceil_mode else around
    x = xp.pad(x, [(0, 0), (0, 0), *around], -math.inf)
    return xp.max_pool(x, kernel_shape, strides, dilations)


def average_pool(
    xp: Any, x: Any, kernel_shape: Sequence[int], dilations: Any = None, ceil_mode: int = 0,
    count_include_pad: int = 0, **given: Any,
) -> Any:  # fmt: skip
    dilations = dilations or [1] * len(kernel_shape)
    strides, around = _around(x, kernel_shape, given, dilations)
    whole = _with_last(x, kernel_shape, strides, around, dilations) if ceil_mode else around
    padded = xp.pad(x, [(0, 0), (0, 0), *whole], 0)
    pooled = xp.mean_pool(padded, kernel_shape, strides, dilations)
    counted = around if count_include_pad else [(0, 0)] * len(around)
    if counted == whole:
        return pooled
    ones = xp.pad(0 * x[:1, :1] + 1, [(0, 0), (0, 0), *counted], 1)
    rest = [(a - c, b - d) for (a, b), (c, d) in zip(whole, counted, strict=True)]
    ones = xp.pad(ones, [(0, 0), (0, 0), *rest], 0)
    return pooled / xp.mean_pool(ones, kernel_shape, strides, dilations)


def _with_last(
    x: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    around: list[tuple[int, int]],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """More zeros at the end, so that the last window that begins in the image is whole."""
    whole = []
    for size, reach, stride, (before, after), dilation in zip(
        x.shape[2:], kernel, strides, around, dilations, strict=True
    ):
        width = (reach - 1) * dilation + 1
        steps = -(-(size + before + after - width) // stride)
        steps -= steps * stride >= size + before
        whole.append((before, max(steps * stride + width - size - before, after)))
    return whole


def global_pool(name: str) -> Run:
    """Over height and width, which stay with size 1."""
    return lambda xp, x: getattr(xp, name)(x, axis=tuple(range(2, x.ndim)), keepdims=True)


def layer_norm(
    xp: Any, x: Any, scale: Any, bias: Any = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Any:  # fmt: skip
    return xp.layer_norm(x, axis % x.ndim, scale, bias, epsilon)


def rms_norm(
    xp: Any, x: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    wide = xp.cast(x, "float32")
    along = tuple(range(axis % x.ndim, x.ndim))
    root = xp.sqrt(xp.mean(wide * wide, axis=along, keepdims=True) + epsilon)
    return xp.cast(wide / root, xp.dtype_name(x)) * scale


def instance_norm(xp: Any, x: Any, scale: Any, bias: Any, *, epsilon: float = 1e-5) -> Any:
    return xp.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_norm(
    xp: Any, x: Any, scale: Any, bias: Any, *, num_groups: int, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Any:  # fmt: skip
    return xp.group_norm(x, num_groups, scale, bias, epsilon)


def batch_norm(
    xp: Any, x: Any, *given: Any, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:  # fmt: skip
    shape = [-1] + [1] * (x.ndim - 2)
    scale, bias, mean, variance = (each.reshape(shape) for each in given)
    return (x - mean) / xp.sqrt(variance + epsilon) * scale + bias


def resize(
    xp: Any, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None, **rule: Any
) -> Any:
    """Axes that keep their size are left alone."""
    axes = [axis % x.ndim for axis in rule.pop("axes", None) or range(x.ndim)]
    settings = {key: text(v) if isinstance(v, bytes) else v for key, v in rule.items()}
    factors: list[float | None] = [None] * len(axes)
    if sizes is None or not np.size(sizes):
        factors = [float(factor) for factor in np.asarray(scales).reshape(-1)]
        new = [
            math.floor(x.shape[axis] * factor) if factor else 0
            for axis, factor in zip(axes, factors, strict=True)
        ]
    else:
        new = numbers(sizes)
    changed = {
        axis: (size, factor)
        for axis, size, factor in zip(axes, new, factors, strict=True)
        if size != x.shape[axis] or factor not in (None, 1.0)
    }
    return xp.resize(x, changed, settings) if changed else x
