"""What each ONNX operator computes: ``run(xp, *inputs, **attributes)``.

``xp`` computes: :class:`zsseg_rt.onnx.arrays.Numpy`, or the same over torch. Sizes and axes are
NumPy's or lists, on the host, whatever ``xp`` is. Attributes are called as ONNX calls them, and
have its defaults.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zsseg_rt.onnx.operations import ONNX_TYPES

Run = Callable[..., Any]
_DTYPES = {number: name for name, number in ONNX_TYPES.items()}


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


def clip(xp: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if low is None and high is None:
        return x
    bounds = [each.item() if isinstance(each, np.ndarray) else each for each in (low, high)]
    return xp.clip(x, *bounds)


def elu(xp: Any, x: Any, alpha: float = 1.0) -> Any:
    return xp.where(x > 0, x, alpha * xp.expm1(xp.clip(x, None, 0)))


def selu(
    xp: Any, x: Any, alpha: float = 1.67326319217681884, gamma: float = 1.05070102214813232
) -> Any:
    return gamma * elu(xp, x, alpha)


def hard_sigmoid(xp: Any, x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return xp.clip(alpha * x + beta, 0, 1)


def softplus(xp: Any, x: Any) -> Any:
    return xp.clip(x, 0, None) + xp.log1p(xp.exp(-abs(x)))


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


_REDUCED = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
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


def gather_nd(xp: Any, x: Any, indices: Any, batch_dims: int = 0) -> Any:
    if batch_dims:
        raise ValueError(f"batch_dims: expected 0, got {batch_dims}")
    return x[tuple(indices[..., place] for place in range(indices.shape[-1]))]


def expand(xp: Any, x: Any, shape: Any) -> Any:
    return xp.broadcast_to(x, np.broadcast_shapes(tuple(x.shape), tuple(numbers(shape))))


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


def attention(
    xp: Any, q: Any, k: Any, v: Any, mask: Any = None, is_causal: int = 0, scale: float = 0.0
) -> Any:
    if is_causal:
        raise ValueError("is_causal: expected 0, got 1")
    scores = q @ xp.permute(k, (0, 1, 3, 2)) * (scale or q.shape[-1] ** -0.5)
    return xp.softmax(scores if mask is None else scores + mask, -1) @ v


class Windows(NamedTuple):
    """How windows lie in an image, by axis: their sizes, steps, what is around it, and spacing."""

    kernel: Sequence[int]
    strides: Sequence[int]
    around: Sequence[tuple[int, int]]
    dilations: Sequence[int]

    @property
    def reach(self) -> list[int]:
        """What a window spans."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return [(size - 1) * step + 1 for size, step in pairs]


def _windows(x: Any, kernel: Sequence[int], rule: dict[str, Any]) -> Windows:
    """As attributes say it."""
    rank = len(kernel)
    pads, mode = rule.get("pads") or [0] * 2 * rank, text(rule.get("auto_pad", b"NOTSET"))
    lie = Windows(
        kernel,
        rule.get("strides") or [1] * rank,
        list(zip(pads[:rank], pads[rank:], strict=True)),
        rule.get("dilations") or [1] * rank,
    )
    if mode.startswith("SAME"):
        around = []
        for size, reach, stride in zip(x.shape[2:], lie.reach, lie.strides, strict=True):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            around.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return lie._replace(around=around)
    if rule.get("ceil_mode", 0):  # the last window that begins in the image is whole
        around = []
        sides = zip(x.shape[2:], lie.reach, lie.strides, lie.around, strict=True)
        for size, reach, stride, (before, after) in sides:
            steps = -(-(size + before + after - reach) // stride)
            steps -= steps * stride >= size + before
            around.append((before, max(steps * stride + reach - size - before, after)))
        return lie._replace(around=around)
    return lie


def conv(xp: Any, x: Any, weight: Any, bias: Any = None, group: int = 1, **rule: Any) -> Any:
    return xp.conv(x, weight, bias, _windows(x, weight.shape[2:], rule), group)


def conv_transpose(
    xp: Any, x: Any, weight: Any, bias: Any = None, group: int = 1, **rule: Any
) -> Any:
    if text(rule.get("auto_pad", b"NOTSET")) != "NOTSET":
        raise ValueError("auto_pad: expected stated pads")
    lie = _windows(x, weight.shape[2:], rule)
    more = rule.get("output_padding") or [0] * len(lie.kernel)
    return xp.conv_transpose(x, weight, bias, lie, more, group)


def max_pool(xp: Any, x: Any, kernel_shape: Sequence[int], **rule: Any) -> Any:
    lie = _windows(x, kernel_shape, rule)
    return xp.max_pool(xp.pad(x, [(0, 0), (0, 0), *lie.around], -math.inf), lie)


def average_pool(
    xp: Any, x: Any, kernel_shape: Sequence[int], count_include_pad: int = 0, **rule: Any
) -> Any:
    lie = _windows(x, kernel_shape, rule)
    pooled = xp.mean_pool(xp.pad(x, [(0, 0), (0, 0), *lie.around], 0), lie)
    stated = _windows(x, kernel_shape, {**rule, "ceil_mode": 0}).around
    counted = stated if count_include_pad else [(0, 0)] * len(stated)
    if counted == lie.around:
        return pooled
    rest = [(a - c, b - d) for (a, b), (c, d) in zip(lie.around, counted, strict=True)]
    ones = xp.pad(0 * x[:1, :1] + 1, [(0, 0), (0, 0), *counted], 1)
    return pooled / xp.mean_pool(xp.pad(ones, [(0, 0), (0, 0), *rest], 0), lie)


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


RUNS: dict[str, Run] = {
    **{f"Reduce{name}": reduction(f"Reduce{name}") for name in _REDUCED.split()},
    "Abs": lambda xp, x: abs(x),
    "Add": lambda xp, a, b: a + b,
    "And": lambda xp, a, b: xp.logical_and(a, b),
    "ArgMax": largest(1),
    "ArgMin": largest(-1),
    "Attention": attention,
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": lambda xp, x, to, saturate=1: xp.cast(x, _DTYPES[to]),
    "CastLike": lambda xp, x, like, saturate=1: xp.cast(x, xp.dtype_name(like)),
    "Ceil": lambda xp, x: xp.ceil(x),
    "Celu": lambda xp, x, alpha=1.0: elu(xp, x / alpha, alpha) if alpha != 1 else elu(xp, x),
    "Clip": clip,
    "Concat": lambda xp, *parts, axis: xp.concat(parts, axis),
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Cos": lambda xp, x: xp.cos(x),
    "CumSum": cumsum,
    "DepthToSpace": depth_to_space,
    "Div": divide,
    "Dropout": lambda xp, x, *_, **__: (x, x == x),
    "Einsum": lambda xp, *inputs, equation: xp.einsum(text(equation).replace(" ", ""), *inputs),
    "Elu": elu,
    "Equal": lambda xp, a, b: a == b,
    "Erf": lambda xp, x: xp.erf(x),
    "Exp": lambda xp, x: xp.exp(x),
    "Expand": expand,
    "Flatten": flatten,
    "Floor": lambda xp, x: xp.floor(x),
    "Gather": gather,
    "GatherElements": lambda xp, x, indices, axis=0: xp.take_along(x, indices, axis),
    "GatherND": gather_nd,
    "Gelu": lambda xp, x, approximate=b"none": xp.gelu(x, text(approximate)),
    "Gemm": gemm,
    "GlobalAveragePool": lambda xp, x: xp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True),
    "GlobalMaxPool": lambda xp, x: xp.amax(x, axis=tuple(range(2, x.ndim)), keepdims=True),
    "Greater": lambda xp, a, b: a > b,
    "GreaterOrEqual": lambda xp, a, b: a >= b,
    "GroupNormalization": group_norm,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": lambda xp, x: x * hard_sigmoid(xp, x, 1 / 6),
    "Identity": lambda xp, x: x,
    "InstanceNormalization": lambda xp, x, *given, **more: group_norm(
        xp, x, *given, num_groups=x.shape[1], **more
    ),
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda xp, x, alpha=0.01: xp.where(x < 0, alpha * x, x),
    "Less": lambda xp, a, b: a < b,
    "LessOrEqual": lambda xp, a, b: a <= b,
    "Log": lambda xp, x: xp.log(x),
    "LogSoftmax": log_softmax,
    "LpNormalization": lp_norm,
    "MatMul": lambda xp, a, b: xp.matmul(a, b),
    "Max": lambda xp, *inputs: functools.reduce(xp.maximum, inputs),
    "MaxPool": max_pool,
    "Mean": lambda xp, *inputs: functools.reduce(xp.add, inputs) / len(inputs),
    "Min": lambda xp, *inputs: functools.reduce(xp.minimum, inputs),
    "Mish": lambda xp, x: x * xp.tanh(softplus(xp, x)),
    "Mod": lambda xp, a, b, fmod=0: xp.fmod(a, b) if fmod else xp.remainder(a, b),
    "Mul": lambda xp, a, b: a * b,
    "Neg": lambda xp, x: -x,
    "Not": lambda xp, x: xp.logical_not(x),
    "Or": lambda xp, a, b: xp.logical_or(a, b),
    "PRelu": lambda xp, x, slope: xp.where(x < 0, slope * x, x),
    "Pad": pad,
    "Pow": lambda xp, a, b: xp.cast(a**b, xp.dtype_name(a)),
    "RMSNormalization": rms_norm,
    "Range": range_,
    "Reciprocal": lambda xp, x: 1 / x,
    "Relu": lambda xp, x: xp.relu(x),
    "Reshape": reshape,
    "Resize": resize,
    "Round": lambda xp, x: xp.round(x),
    "Selu": selu,
    "Shape": shape,
    "Sigmoid": lambda xp, x: xp.sigmoid(x),
    "Sign": lambda xp, x: xp.sign(x),
    "Sin": lambda xp, x: xp.sin(x),
    "Size": lambda xp, x: np.array(math.prod(x.shape), np.int64),
    "Slice": slice_,
    "Softmax": softmax,
    "Softplus": softplus,
    "Softsign": lambda xp, x: x / (1 + abs(x)),
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Sqrt": lambda xp, x: xp.sqrt(x),
    "Squeeze": squeeze,
    "Sub": lambda xp, a, b: a - b,
    "Sum": lambda xp, *inputs: functools.reduce(xp.add, inputs),
    "Swish": lambda xp, x, alpha=1.0: x * xp.sigmoid(alpha * x),
    "Tanh": lambda xp, x: xp.tanh(x),
    "ThresholdedRelu": lambda xp, x, alpha=1.0: xp.where(x > alpha, x, 0 * x),
    "Tile": lambda xp, x, repeats: xp.tile(x, tuple(numbers(repeats))),
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
    "Where": lambda xp, condition, a, b: xp.where(condition, a, b),
    "Xor": lambda xp, a, b: xp.logical_xor(a, b),
}
