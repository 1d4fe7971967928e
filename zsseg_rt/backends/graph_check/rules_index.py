"""Operators with indices: OpenVINO reads and writes wherever these point, so they are bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from zsseg_rt.backends.graph_check.rules_elementwise import broadcast
from zsseg_rt.backends.graph_check.value import INT32, INT64, Call, Dim, Shape, Value, full


def _check_bounds(call: Call, index: Value, sizes: Sequence[Dim], *, tokens: bool = False) -> None:
    """Check that every index is inside the smallest of the axes that it may point into."""
    if index.dtype not in (INT32, INT64):
        raise ValueError(f"indices: expected int32 or int64, got data type {index.dtype}")
    if None in sizes:
        raise ValueError("indices: expected an axis of known size, got one known at run time")
    size = min((size for size in sizes if size is not None), default=0)
    bounds = index.bounds()
    if bounds is None and tokens and index.source and size:
        call.token_rows[index.source] = min(size, call.token_rows.get(index.source, size))
        return
    if bounds is None or not -size <= bounds[0] <= bounds[1] < size:
        raise ValueError(
            f"indices: expected constants, or values bounded by the graph, from {-size} to "
            f"{size - 1}, got {'unbounded ones' if bounds is None else bounds}"
        )


def _gather(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    axis = call.axis(len(data.shape))
    _check_bounds(call, index, [data.shape[axis]], tokens=True)
    shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    numbers, places = data.known(), index.known()
    known = None
    if numbers is not None and places is not None and None not in places.reshape(-1):
        known = np.asarray(np.take(numbers, places.astype(np.int64), axis), object)
        known = known.reshape([size or 0 for size in shape])
    return Value(data.dtype, shape, known=known, bounds=data.bounds())


def _gather_elements(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    axis = _elements_axis(call, data, index)
    _check_bounds(call, index, [data.shape[axis]])
    return Value(data.dtype, index.shape, bounds=data.bounds())


def _elements_axis(call: Call, data: Value, index: Value) -> int:
    """The axis of GatherElements and ScatterElements; no other axis is longer than the data's."""
    axis, rank = call.axis(len(data.shape)), len(data.shape)
    longer = len(index.shape) != rank or any(
        size is None or count is None or count > size
        for other, (size, count) in enumerate(zip(data.shape, index.shape, strict=False))
        if other != axis
    )
    if longer:
        raise ValueError(
            f"indices: expected a shape within {list(data.shape)}, got {list(index.shape)}"
        )
    return axis


def _scatter_elements(call: Call) -> Value:
    data, index, updates = (call.value(position) for position in range(3))
    axis = _elements_axis(call, data, index)
    _check_bounds(call, index, [data.shape[axis]])
    _check_updates(call, data, updates, index.shape)
    return Value(data.dtype, data.shape)


def _check_updates(call: Call, data: Value, updates: Value, shape: Shape) -> None:
    if updates.dtype != data.dtype or updates.shape != shape or None in shape:
        raise ValueError(
            f"updates: expected {list(shape)} of data type {data.dtype}, got "
            f"{list(updates.shape)} of {updates.dtype}"
        )


def _tuple_sizes(call: Call, data: Value, index: Value, batch: int) -> int:
    """How many axes the last axis of GatherND's and ScatterND's indices names, all checked."""
    depth = index.shape[-1] if index.shape else None
    if depth is None or not 0 < depth <= len(data.shape) - batch or None in index.shape:
        raise ValueError(
            f"indices: expected tuples for the axes of {list(data.shape)}, got {list(index.shape)}"
        )
    sizes = data.shape[batch : batch + depth]
    columns = index.columns
    if index.tensor is not None:
        numbers = index.numbers().reshape(-1, depth)
        if not numbers.size:
            raise ValueError("indices: expected some, got none")
        columns = tuple((int(part.min()), int(part.max())) for part in numbers.T)
    if len(columns) != depth:
        _check_bounds(call, index, sizes)
        return depth
    for bounds, size in zip(columns, sizes, strict=True):
        _check_bounds(call, Value(index.dtype, (), bounds=bounds), [size])
    return depth


def _gather_nd(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    batch = call.number("batch_dims", 0)
    fits = 0 <= batch < min(len(data.shape), len(index.shape))
    if not fits or data.shape[:batch] != index.shape[:batch]:
        raise ValueError(f"batch_dims: expected axes that both inputs share, got {batch}")
    depth = _tuple_sizes(call, data, index, batch)
    return Value(data.dtype, (*index.shape[:-1], *data.shape[batch + depth :]))


def _scatter_nd(call: Call) -> Value:
    data, index, updates = (call.value(position) for position in range(3))
    depth = _tuple_sizes(call, data, index, 0)
    _check_updates(call, data, updates, (*index.shape[:-1], *data.shape[depth:]))
    return Value(data.dtype, data.shape)


def _one_hot(call: Call) -> Value:
    index, values = call.value(0), call.value(2)
    depth = [int(number) for number in (_constant(call, 1) or ())]
    if len(depth) != 1 or depth[0] < 1 or values.shape != (2,):
        raise ValueError(f"expected a depth of 1 or more and two values, got {depth}")
    _check_bounds(call, index, depth)
    axis = call.axis(len(index.shape), -1, extra=1)
    return Value(values.dtype, (*index.shape[:axis], depth[0], *index.shape[axis:]))


def _constant(call: Call, position: int) -> list[float] | None:
    """The few numbers of an input, as far as they are known."""
    value = call.value(position)
    known = value.known()
    if known is not None:
        found = list(known.reshape(-1))
        return None if None in found else [float(number) for number in found]
    return [float(number) for number in value.numbers().reshape(-1)] if value.tensor else None


def _top_k(call: Call) -> list[Value]:
    data, count = call.value(0), call.constants(1)
    axis = call.axis(len(data.shape), -1)
    size = data.shape[axis]
    if size is None or len(count) != 1 or not 1 <= count[0] <= size:
        raise ValueError(f"k: expected 1 to {size}, got {count}")
    shape = (*data.shape[:axis], count[0], *data.shape[axis + 1 :])
    return [Value(data.dtype, shape), Value(INT64, shape, bounds=(0, size - 1))]


def _range(call: Call) -> Value:
    dtype = call.value(0).dtype
    if any(call.value(index).size != 1 or call.value(index).dtype != dtype for index in (1, 2)):
        raise ValueError("expected three numbers of one type, got others")
    if not all(call.value(index).is_sized() for index in range(3)):
        raise ValueError("expected constants or sizes, got computed numbers")
    parts = [_constant(call, index) for index in range(3)]
    if any(part is None for part in parts):
        return Value(dtype, (None,))
    start, limit, step = (part[0] for part in parts if part)
    length = (limit - start) / step if step else math.nan
    if not all(map(math.isfinite, (start, limit, step, length))):
        raise ValueError(f"expected finite numbers and a step, got {[start, limit, step]}")
    count = max(0, math.ceil(length))
    if dtype not in (INT32, INT64):
        return Value(dtype, (count,))
    last = int(start) + (count - 1) * int(step)
    bounds = (min(int(start), last), max(int(start), last)) if count else None
    known = None
    if full((count,), 0) is not None:
        known = np.array([int(start) + index * int(step) for index in range(count)], object)
    return Value(dtype, (count,), known=known, bounds=bounds)


def _constant_of_shape(call: Call) -> Value:
    shape, fill = tuple(call.integers(0)), call.attributes.get("value")
    if any(size is not None and size < 0 for size in shape):
        raise ValueError(f"expected sizes of 0 or more, got {list(shape)}")
    if fill is None:
        return Value(1, shape)
    if math.prod(fill.dims) != 1:
        raise ValueError(f"value: expected one number, got {list(fill.dims)}")
    dtype, bounds = fill.data_type, None
    if dtype not in (INT32, INT64):
        return Value(dtype, shape)
    number = int(fill.array().reshape(-1)[0])
    bounds = (number, number)
    return Value(dtype, broadcast([shape]), known=full(shape, number), bounds=bounds)


RULES: dict[str, Callable[[Call], Value | list[Value]]] = {
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Range": _range,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
