"""The longer ONNX operators: ``run(xp, *inputs, **attributes)``; the table has others.

``xp`` is :class:`zsseg_rt.onnx.arrays.Numpy` or that over torch; sizes and axes are on the host.
Attributes have ONNX's names and defaults. Arguments have no types, as they would all be ``Any``.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np


def numbers(operand):
    """Sizes or axes as a list; none of nothing."""
    return [] if operand is None else [int(number) for number in np.asarray(operand).reshape(-1)]


def text(attribute):
    """A text attribute."""
    return attribute.decode() if isinstance(attribute, bytes) else attribute


def named(name):
    """A run that is the library's function of this name."""
    return lambda xp, *inputs: getattr(xp, name)(*inputs)


# --- number by number ---


def clip(xp, x, low=None, high=None):
    if low is None and high is None:
        return x
    bounds = [each.item() if isinstance(each, np.ndarray) else each for each in (low, high)]
    return xp.clip(x, *bounds)


def elu(xp, x, alpha=1.0):
    return xp.where(x > 0, x, alpha * xp.expm1(xp.clip(x, None, 0)))


def hard_sigmoid(xp, x, alpha=0.2, beta=0.5):
    return xp.clip(alpha * x + beta, 0, 1)


def softplus(xp, x):
    return xp.clip(x, 0, None) + xp.log1p(xp.exp(-abs(x)))


# --- along axes ---


def softmax(xp, x, axis=-1, flattened=0):
    if flattened:
        return xp.softmax(flatten(xp, x, axis), -1).reshape(x.shape)
    return xp.softmax(x, axis)


def log_softmax(xp, x, axis=-1, flattened=0):
    if flattened:
        return log_softmax(xp, flatten(xp, x, axis)).reshape(x.shape)
    return x - _log_sum_exp(xp, x, (axis,), True)


def _log_sum_exp(xp, x, axis, keepdims):
    largest = xp.amax(x, axis=axis, keepdims=True)
    result = xp.log(xp.sum(xp.exp(x - largest), axis=axis, keepdims=True)) + largest
    return result if keepdims else xp.sum(result, axis=axis, keepdims=False)


def _product(xp, x, axis, keepdims):
    for place in sorted((each % x.ndim for each in axis), reverse=True):
        x = xp.prod(x, axis=place, keepdims=keepdims)
    return x


def _reduction(reduce):
    def run(xp, x, axes=None, keepdims=1, noop_with_empty_axes=0):
        if not numbers(axes) and noop_with_empty_axes:
            return x
        along = tuple(numbers(axes) or range(x.ndim))
        return reduce(xp, x, axis=along, keepdims=bool(keepdims))

    return run


REDUCTIONS = {
    "ReduceL1": _reduction(lambda xp, x, **along: xp.sum(abs(x), **along)),
    "ReduceL2": _reduction(lambda xp, x, **along: xp.norm(x, **along)),
    "ReduceLogSum": _reduction(lambda xp, x, **along: xp.log(xp.sum(x, **along))),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(lambda xp, x, **along: xp.amax(x, **along)),
    "ReduceMean": _reduction(lambda xp, x, **along: xp.mean(x, **along)),
    "ReduceMin": _reduction(lambda xp, x, **along: xp.amin(x, **along)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(lambda xp, x, **along: xp.sum(x, **along)),
    "ReduceSumSquare": _reduction(lambda xp, x, **along: xp.sum(x * x, **along)),
}


def place(xp, find, x, axis=0, keepdims=1, select_last_index=0):
    places = find(xp.flip(x, (axis,)) if select_last_index else x, axis)
    places = x.shape[axis] - 1 - places if select_last_index else places
    return xp.unsqueeze(places, axis) if keepdims else places


def top_k(xp, x, count, axis=-1, largest=1, sorted=1):
    places = xp.order(x, axis, descending=bool(largest))
    places = _slice_one(xp, places, axis % x.ndim, range(numbers(count)[0]))
    return xp.take_along(x, places, axis), places


def cumsum(xp, x, axis, exclusive=0, reverse=0):
    along = numbers(axis)[0]
    x = xp.flip(x, (along,)) if reverse else x
    total = xp.cumsum(x, along)
    total = total - x if exclusive else total
    return xp.flip(total, (along,)) if reverse else total


# --- elements that move ---


def reshape(xp, x, shape, allowzero=0):
    sizes = numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(xp, x, axis=1):
    axis = axis if axis >= 0 else axis + x.ndim
    return x.reshape([math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def transpose(xp, x, perm=None):
    return xp.permute(x, tuple(range(x.ndim)[::-1] if perm is None else perm))


def squeeze(xp, x, axes=None):
    dropped = [axis for axis, size in enumerate(x.shape) if size == 1]
    if axes is not None:
        dropped = [axis % x.ndim for axis in numbers(axes)]
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in dropped])


def unsqueeze(xp, x, axes):
    shape, rank = list(x.shape), x.ndim + len(numbers(axes))
    for axis in sorted(axis % rank for axis in numbers(axes)):
        shape.insert(axis, 1)
    return x.reshape(shape)


def split(xp, x, split=None, axis=0, num_outputs=1):
    """Without sizes, into ``num_outputs`` parts of which the last may be smaller."""
    size = x.shape[axis]
    whole = -(-size // num_outputs)
    sizes = numbers(split) or [min(whole, size - at) for at in range(0, size, whole)]
    starts = np.cumsum([0, *sizes]).tolist()
    spans = map(range, starts, starts[1:])
    return tuple(_slice_one(xp, x, axis % x.ndim, span) for span in spans)


def slice_(xp, x, starts, ends, axes=None, steps=None):
    first = numbers(starts)
    along = range(len(first)) if axes is None else numbers(axes)
    by = [1] * len(first) if steps is None else numbers(steps)
    for start, end, axis, step in zip(first, numbers(ends), along, by, strict=True):
        span = range(*slice(start, end, step).indices(x.shape[axis]))
        x = _slice_one(xp, x, axis % x.ndim, span)
    return x


def _slice_one(xp, x, axis, span):
    """Evenly spaced places of an axis: a view, where they ascend."""
    up = span if span.step > 0 else span[::-1]
    part = x[(slice(None),) * axis + (slice(up.start, up.stop, up.step),)]
    return part if span.step > 0 else xp.flip(part, (axis,))


def gather(xp, x, indices, axis=0):
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


def gather_nd(xp, x, indices, batch_dims=0):
    if batch_dims:
        raise ValueError(f"batch_dims: expected 0, got {batch_dims}")
    return x[tuple(indices[..., place] for place in range(indices.shape[-1]))]


def scatter_nd(xp, x, indices, updates, reduction=b"none"):
    if text(reduction) != "none":
        raise ValueError(f"reduction: expected none, got {text(reduction)}")
    result = xp.concat((x,), 0)  # a copy
    result[tuple(indices[..., place] for place in range(indices.shape[-1]))] = updates
    return result


def expand(xp, x, shape):
    return xp.broadcast_to(x, np.broadcast_shapes(tuple(x.shape), tuple(numbers(shape))))


def pad(xp, x, pads, value=None, axes=None, mode=b"constant"):
    along = [axis % x.ndim for axis in numbers(axes)] or list(range(x.ndim))
    around = numbers(pads)
    each = [(0, 0)] * x.ndim
    for axis, before, after in zip(along, around, around[len(along) :], strict=False):
        each[axis] = (before, after)
    if text(mode) == "constant":
        return xp.pad(x, each, 0 if value is None else value)
    for axis, (before, after) in enumerate(each):
        places = np.pad(np.arange(x.shape[axis]), (before, after), mode=text(mode))
        x = xp.take(x, places, axis) if before or after else x
    return x


def depth_to_space(xp, x, blocksize, mode=b"DCR"):
    batch, channels, height, width = x.shape
    if text(mode) == "DCR":
        cut = x.reshape([batch, blocksize, blocksize, -1, height, width])
        cut = xp.permute(cut, (0, 3, 4, 1, 5, 2))
    else:
        cut = x.reshape([batch, -1, blocksize, blocksize, height, width])
        cut = xp.permute(cut, (0, 1, 4, 2, 5, 3))
    return cut.reshape([batch, channels // blocksize**2, height * blocksize, width * blocksize])


def space_to_depth(xp, x, blocksize):
    batch, _, height, width = x.shape
    rows, columns = height // blocksize, width // blocksize
    cut = x.reshape([batch, -1, rows, blocksize, columns, blocksize])
    return xp.permute(cut, (0, 3, 5, 1, 2, 4)).reshape([batch, -1, rows, columns])


def shape(xp, x, start=0, end=None):
    return np.array(tuple(x.shape)[slice(start, end)], np.int64)


def constant(xp, **values):
    ((name, value),) = values.items()
    if isinstance(value, (int, float, list)):
        return np.array(value, np.int64 if name.startswith("value_int") else np.float32)
    return getattr(value, "array", value)


def constant_of_shape(xp, sizes, value=None):
    fill = np.zeros(1, np.float32) if value is None else getattr(value, "array", value)
    return np.full(numbers(sizes), fill.reshape(()))


def range_(xp, start, limit, step):
    begin, end, by = (np.asarray(each).item() for each in (start, limit, step))
    count = max(0, math.ceil((end - begin) / by))
    return (begin + np.arange(count) * by).astype(np.asarray(start).dtype)


# --- products, windows, norms ---


def gemm(xp, a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def attention(xp, q, k, v, mask=None, is_causal=0, scale=0.0):
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
        """The span of a window, by axis."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return [(size - 1) * step + 1 for size, step in pairs]


def windows(image, kernel, rule):
    """As attributes say it, in an image of some sizes."""
    rank, mode = len(kernel), text(rule.get("auto_pad", b"NOTSET"))
    pads, ones = rule.get("pads") or [0] * 2 * rank, [1] * rank
    around = list(zip(pads[:rank], pads[rank:], strict=True))
    lie = Windows(kernel, rule.get("strides") or ones, around, rule.get("dilations") or ones)
    sides = zip(image, lie.reach, lie.strides, around, strict=True)
    if mode.startswith("SAME"):
        around = []
        for size, reach, stride, _ in sides:
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            around.append((small, large) if mode == "SAME_UPPER" else (large, small))
    elif rule.get("ceil_mode", 0):  # the last window that begins in the image is whole
        around = []
        for size, reach, stride, (before, after) in sides:
            steps = -(-(size + before + after - reach) // stride)
            steps -= steps * stride >= size + before
            around.append((before, max(steps * stride + reach - size - before, after)))
    return lie._replace(around=around)


def conv(xp, x, weight, bias=None, group=1, **rule):
    return xp.conv(x, weight, bias, windows(x.shape[2:], weight.shape[2:], rule), group)


def conv_transpose(xp, x, weight, bias=None, group=1, **rule):
    if text(rule.get("auto_pad", b"NOTSET")) != "NOTSET":
        raise ValueError("auto_pad: expected stated pads")
    lie = windows(x.shape[2:], weight.shape[2:], rule)
    more = rule.get("output_padding") or [0] * len(lie.kernel)
    return xp.conv_transpose(x, weight, bias, lie, more, group)


def max_pool(xp, x, kernel_shape, **rule):
    lie = windows(x.shape[2:], kernel_shape, rule)
    return xp.max_pool(xp.pad(x, [(0, 0), (0, 0), *lie.around], -math.inf), lie)


def average_pool(xp, x, kernel_shape, count_include_pad=0, **rule):
    lie = windows(x.shape[2:], kernel_shape, rule)
    pooled = xp.mean_pool(xp.pad(x, [(0, 0), (0, 0), *lie.around], 0), lie)
    stated = windows(x.shape[2:], kernel_shape, {**rule, "ceil_mode": 0}).around
    counted = stated if count_include_pad else [(0, 0)] * len(stated)
    if counted == lie.around:
        return pooled
    rest = [(a - c, b - d) for (a, b), (c, d) in zip(lie.around, counted, strict=True)]
    ones = xp.pad(0 * x[:1, :1] + 1, [(0, 0), (0, 0), *counted], 1)
    return pooled / xp.mean_pool(xp.pad(ones, [(0, 0), (0, 0), *rest], 0), lie)


def layer_norm(xp, x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    return xp.layer_norm(x, axis % x.ndim, scale, bias, epsilon)


def rms_norm(xp, x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    wide = xp.cast(x, "float32")
    along = tuple(range(axis % x.ndim, x.ndim))
    root = xp.sqrt(xp.mean(wide * wide, axis=along, keepdims=True) + epsilon)
    return xp.cast(wide / root, xp.dtype_name(x)) * scale


def group_norm(xp, x, scale, bias, *, num_groups=0, epsilon=1e-5, stash_type=1):
    """Without a number of groups, each channel is one: InstanceNormalization."""
    return xp.group_norm(x, num_groups or x.shape[1], scale, bias, epsilon)


def batch_norm(xp, x, *operands, epsilon=1e-5, momentum=0.9, training_mode=0):
    shape = [-1] + [1] * (x.ndim - 2)
    scale, bias, mean, variance = (each.reshape(shape) for each in operands)
    return (x - mean) / xp.sqrt(variance + epsilon) * scale + bias


def resize(xp, x, roi=None, scales=None, sizes=None, **rule):
    """One axis after another: rows are picked, or mixed by a matrix."""
    axes = [axis % x.ndim for axis in rule.pop("axes", None) or range(x.ndim)]
    settings = tuple(sorted((key, text(value)) for key, value in rule.items()))
    new, factors = numbers(sizes), [None] * len(axes)
    if not new:
        factors = [float(factor) for factor in np.asarray(scales).reshape(-1)]
        pairs = zip(axes, factors, strict=True)
        new = [math.floor(x.shape[axis] * factor) for axis, factor in pairs]
    for axis, size, factor in zip(axes, new, factors, strict=True):
        old, before, behind = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]
        if size == old and factor in (None, 1.0):
            continue
        weights = resize_weights(old, size, factor, settings)
        if size % old == 0 and np.array_equal(weights, np.arange(size) // (size // old)):
            wide = xp.broadcast_to(xp.unsqueeze(x, axis + 1), (*before, old, size // old, *behind))
            x = wide.reshape((*before, size, *behind))
            continue
        weights = xp.keep(weights, getattr(x, "device", None))
        if weights.ndim == 1:
            x = xp.take(x, weights, axis)
        else:
            rows = xp.moveaxis(x, axis, -1) @ xp.cast(weights, xp.dtype_name(x)).T
            x = xp.moveaxis(rows, -1, axis)
    return x


@cache
def resize_weights(size, new, factor, rule):
    """Places int64 [new] that mode ``nearest`` picks, or weights float32 [new, size]."""
    weights = resize_matrix(size, new, factor, dict(rule))
    return weights if weights.ndim == 1 else weights.astype(np.float32)


def resize_matrix(size, new, factor, settings):
    """As :func:`resize_weights`, weights in float64."""
    mode, scale = settings.get("mode", "nearest"), factor or new / size
    places = _resize_places(settings, size, new, scale)
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(places - 0.5),
            "round_prefer_ceil": np.floor(places + 0.5),
            "floor": np.floor(places),
            "ceil": np.ceil(places),
        }[settings.get("nearest_mode", "round_prefer_floor")]
        return np.clip(rounded, 0, size - 1).astype(np.int64)
    stretch = max(1.0, 1 / scale) if settings.get("antialias", 0) else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) * stretch)
    taps = np.floor(places)[:, None] + np.arange(-reach, reach + 2)
    far = np.abs((taps - places[:, None]) / stretch)
    if mode == "linear":
        weights = np.maximum(0, 1 - far)
    else:
        a = settings.get("cubic_coeff_a", -0.75)
        near = ((a + 2) * far - (a + 3)) * far * far + 1
        tail = ((far - 5) * far + 8) * a * far - 4 * a
        weights = np.where(far <= 1, near, np.where(far < 2, tail, 0))
    if settings.get("exclude_outside", 0):
        weights = np.where((taps < 0) | (taps >= size), 0, weights)
    weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((new, size))
    columns = np.clip(taps, 0, size - 1).astype(np.int64)
    np.add.at(matrix, (np.arange(new)[:, None], columns), weights)
    return matrix


def _resize_places(settings, size, new, scale):
    """Where the new places lie among the old ones."""
    coordinates, steps = settings.get("coordinate_transformation_mode"), np.arange(float(new))
    if coordinates == "align_corners":
        return steps * ((size - 1) / (new - 1) if new > 1 else 0)
    if coordinates == "asymmetric":
        return steps / scale
    if coordinates == "pytorch_half_pixel" and new == 1:
        return np.zeros(1)
    return (steps + 0.5) / scale - 0.5
