"""One rule per operator: what it may be given, and the type and size of what it makes.

Products, convolutions and norms are in ``rules_network``. OpenVINO reads and writes wherever an
index points, so an index is a constant inside its axis, or a place along an axis no longer than it:
ArgMax, ArgMin or TopK, through Cast, Reshape, Slice and Concat alone. No rule computes numbers:
what follows from fixed sizes was computed when the bundle was written; here sizes are only moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from zsseg_rt.backends.graph_check.value import (
    INT32,
    INT64,
    Call,
    Dim,
    Known,
    Shape,
    Value,
    known_size,
    place,
)

BOOL = 9
_INTEGERS = (2, 3, 4, 5, INT32, INT64, 12, 13)
_FLOATS = (1, 10, 11, 16)
_SAME = """Abs Ceil Celu Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log
LogSoftmax LpNormalization Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softmax Softplus
Softsign Sqrt Swish Tanh ThresholdedRelu"""
_COMBINE = """Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
PRelu Pow Sub Sum Xor"""
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare"""
_WITH_AXIS = ("Softmax", "LogSoftmax", "LpNormalization")


def broadcast(shapes: list[Shape]) -> Shape:
    """The shape of a result whose operands are repeated along axes of size 1."""
    result: list[Dim] = []
    for sizes in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        fixed = {size for size in sizes if size not in (1, None)}
        if len(fixed) > 1:
            raise ValueError(f"expected shapes that fit, got {list(map(list, shapes))}")
        result.append(fixed.pop() if fixed else (None if None in sizes else 1))
    return tuple(result[::-1])


def _same(call: Call) -> Value:
    value = call.value(0)
    if call.op_type in _WITH_AXIS:
        call.axis(len(value.shape), -1 if call.opset >= 13 or call.op_type[0] == "L" else 1)
    if call.op_type == "Identity":
        return value
    return Value(value.dtype, value.shape)


def _cast(call: Call) -> Value:
    value, dtype = call.value(0), call.number("to", 0)
    if dtype not in (*_INTEGERS, *_FLOATS, BOOL):
        raise ValueError(f"to: expected a type of numbers, got {dtype}")
    if not {value.dtype, dtype} <= {INT32, INT64}:
        return Value(dtype, value.shape)
    return moved(call, value.shape, value.known(), dtype=dtype)


def _cast_like(call: Call) -> Value:
    return Value(call.value(1).dtype, call.value(0).shape)


_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def _combine(call: Call) -> Value:
    values = [call.value(index) for index in range(len(call.inputs))]
    dtypes = {value.dtype for value in values}
    if len(dtypes) > 1 and call.op_type != "Pow":
        raise ValueError(f"expected inputs of one type, got data types {sorted(dtypes)}")
    shape = broadcast([value.shape for value in values])
    dtype = BOOL if call.op_type in _COMPARE else values[0].dtype
    if call.op_type == "PRelu" and shape != values[0].shape and None not in shape:
        raise ValueError(f"slope: expected one that fits {list(values[0].shape)}, got {shape}")
    if values[0].dtype in _INTEGERS and call.op_type in ("Div", "Mod"):
        _check_divisor(call, values[1])
    return Value(dtype, shape)


def _check_divisor(call: Call, divisor: Value) -> None:
    """Integers divided by zero, or the lowest by -1, end the process."""
    bounds = divisor.bounds()
    if bounds is None or bounds[0] < 1:
        told = "values of the graph" if bounds is None else f"{bounds[0]} to {bounds[1]}"
        raise ValueError(f"divisor: expected constants of 1 or more, got {told}")
    if call.number("fmod", 0):
        raise ValueError("fmod: expected 0 for integers, got 1")


def _where(call: Call) -> Value:
    condition, yes, no = (call.value(index) for index in range(3))
    if condition.dtype != BOOL or yes.dtype != no.dtype:
        raise ValueError(
            f"expected a condition and two inputs of one type, got data types {condition.dtype}, "
            f"{yes.dtype} and {no.dtype}"
        )
    return Value(yes.dtype, broadcast([condition.shape, yes.shape, no.shape]))


def _clip(call: Call) -> Value:
    value = call.value(0)
    for index in (1, 2):
        limit = call.given(index)
        if limit is not None and (limit.dtype != value.dtype or limit.size != 1):
            raise ValueError(f"input {index}: expected one number of the input's type")
    return Value(value.dtype, value.shape)


def _dropout(call: Call) -> list[Value]:
    value, training = call.value(0), call.given(2)
    if training is not None:
        raise ValueError("training_mode: expected nothing, got an input")
    return [Value(value.dtype, value.shape), Value(BOOL, value.shape)][: call.num_outputs]


def _cumsum(call: Call) -> Value:
    value = call.value(0)
    axis = call.constants(1)
    if len(axis) != 1 or not -len(value.shape) <= axis[0] < len(value.shape):
        raise ValueError(f"axis: expected one of {len(value.shape)} axes, got {axis}")
    return Value(value.dtype, value.shape)


def _reduce(call: Call) -> Value:
    value = call.value(0)
    axes, rank = call.axes(1, len(value.shape)), len(value.shape)
    if not axes:
        axes = [] if call.number("noop_with_empty_axes", 0) else list(range(rank))
    if call.number("keepdims", 1):
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    else:
        shape = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
    return Value(value.dtype, shape)


def _pick(call: Call) -> Value:
    """ArgMax and ArgMin: places along an axis."""
    shape = list(call.value(0).shape)
    axis = call.axis(len(shape))
    size = shape[axis]
    bounds = (0, size - 1) if size else None
    shape[axis : axis + 1] = [1] if call.number("keepdims", 1) else []
    return Value(INT64, tuple(shape), bounds=bounds)


# --- indices ---


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
            f"indices: expected constants, or places of ArgMax, ArgMin or TopK, from {-size} to "
            f"{size - 1}, got {'computed numbers' if bounds is None else bounds}"
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
    return Value(data.dtype, shape, known=known)


def _gather_elements(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    axis = _elements_axis(call, data, index)
    _check_bounds(call, index, [data.shape[axis]])
    return Value(data.dtype, index.shape)


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
    depth = call.constants(1)
    if len(depth) != 1 or depth[0] < 1 or values.shape != (2,):
        raise ValueError(f"expected a depth of 1 or more and two values, got {depth}")
    _check_bounds(call, index, depth)
    axis = call.axis(len(index.shape), -1, extra=1)
    return Value(values.dtype, (*index.shape[:axis], depth[0], *index.shape[axis:]))


def _top_k(call: Call) -> list[Value]:
    data, count = call.value(0), call.constants(1)
    axis = call.axis(len(data.shape), -1)
    size = data.shape[axis]
    if size is None or len(count) != 1 or not 1 <= count[0] <= size:
        raise ValueError(f"k: expected 1 to {size}, got {count}")
    shape = (*data.shape[:axis], count[0], *data.shape[axis + 1 :])
    return [Value(data.dtype, shape), Value(INT64, shape, bounds=(0, size - 1))]


def _range(call: Call) -> Value:
    dtype, numbers = call.value(0).dtype, []
    for index in range(3):
        value = call.value(index)
        if value.size != 1 or value.dtype != dtype:
            raise ValueError("expected three numbers of one type, got others")
        known = value.known() if dtype in (INT32, INT64) else value.numbers()
        if known is None or None in known.reshape(-1):
            raise ValueError("expected constants or sizes, got computed numbers")
        numbers.append(float(known.reshape(-1)[0]))
    start, limit, step = numbers
    length = (limit - start) / step if step else math.nan
    if not all(map(math.isfinite, (start, limit, step, length))):
        raise ValueError(f"expected finite numbers and a step, got {numbers}")
    return Value(dtype, (max(0, math.ceil(length)),))


def _constant_of_shape(call: Call) -> Value:
    shape, fill = tuple(call.integers(0)), call.attributes.get("value")
    if any(size is not None and size < 0 for size in shape):
        raise ValueError(f"expected sizes of 0 or more, got {list(shape)}")
    if fill is not None and math.prod(fill.dims) != 1:
        raise ValueError(f"value: expected one number, got {list(fill.dims)}")
    return Value(1 if fill is None else fill.data_type, shape)


# --- elements that move ---


_MOST_STEP = 1 << 31


def moved(
    call: Call, shape: Shape, known: Known | None = None, *, dtype: int | None = None
) -> Value:
    """A result whose integers are the first input's, and are as good as indices."""
    value = call.value(0)
    return Value(
        dtype or value.dtype, shape, known=known, bounds=value.bounds(), source=value.source
    )


def _shape(call: Call) -> Value:
    shape = call.value(0).shape
    start, end, _ = slice(call.number("start", 0), call.attributes.get("end")).indices(len(shape))
    known = np.array(shape[start : max(start, end)], object)
    return Value(INT64, known.shape, known=known)


def _size(call: Call) -> Value:
    shape = call.value(0).shape
    count = None if None in shape else math.prod(size for size in shape if size is not None)
    return Value(INT64, (), known=np.array(count, object))


def _reshape(call: Call) -> Value:
    given, asked = call.value(0).shape, call.integers(1)
    if not call.number("allowzero", 0):
        if any(size == 0 and axis >= len(given) for axis, size in enumerate(asked)):
            raise ValueError(f"shape: expected 0 only for the input's axes, got {asked}")
        asked = [given[axis] if size == 0 else size for axis, size in enumerate(asked)]
    if any(size is not None and size < -1 for size in asked) or asked.count(-1) > 1:
        raise ValueError(f"shape: expected sizes and at most one -1, got {asked}")
    open_axes = [axis for axis, size in enumerate(asked) if size in (-1, None)]
    shape: list[Dim] = [None if size == -1 else size for size in asked]
    if None not in given:
        elements = math.prod(size for size in given if size is not None)
        others = math.prod(size for size in shape if size is not None)
        fits = elements % others == 0 if others and open_axes else elements == others
        if not fits:
            raise ValueError(f"shape: expected one for {list(given)}, got {asked}")
        if len(open_axes) == 1:
            shape[open_axes[0]] = elements // others if others else 0
    sizes = tuple(shape)
    known = None
    if None not in sizes:
        known = call.mapped(0, lambda numbers: numbers.reshape(known_size(sizes)))
    return moved(call, sizes, known)


def _flatten(call: Call) -> Value:
    shape = call.value(0).shape
    axis = call.number("axis", 1)
    axis = axis if axis == len(shape) else place("axis", axis, len(shape))
    return Value(call.value(0).dtype, (_product(shape[:axis]), _product(shape[axis:])))


def _product(shape: Shape) -> Dim:
    return None if None in shape else math.prod(size for size in shape if size is not None)


def _transpose(call: Call) -> Value:
    shape = call.value(0).shape
    axes = call.attributes.get("perm", list(range(len(shape)))[::-1])
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"perm: expected each of {len(shape)} axes once, got {axes}")
    return Value(call.value(0).dtype, tuple(shape[axis] for axis in axes))


def _squeeze(call: Call) -> Value:
    shape = call.value(0).shape
    axes = call.axes(1, len(shape))
    if axes is None:
        if None in shape:
            raise ValueError(f"axes: expected them for shape {list(shape)}, got nothing")
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    if any(shape[axis] != 1 for axis in axes):  # OpenVINO does not look
        raise ValueError(f"axes: expected axes of size 1 of {list(shape)}, got {axes}")
    left = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    known = call.mapped(0, lambda numbers: numbers.reshape(known_size(left)))
    return Value(call.value(0).dtype, left, known=known)


def _unsqueeze(call: Call) -> Value:
    shape = list(call.value(0).shape)
    count = len(call.attributes.get("axes") or call.constants(1))
    for axis in sorted(call.axes(1, len(shape) + count) or []):
        shape.insert(axis, 1)
    known = call.mapped(0, lambda numbers: numbers.reshape(known_size(tuple(shape))))
    return Value(call.value(0).dtype, tuple(shape), known=known)


def _concat(call: Call) -> Value:
    values = [call.value(index) for index in range(len(call.inputs))]
    axis = call.axis(len(values[0].shape))
    ranks, dtypes = {len(value.shape) for value in values}, {value.dtype for value in values}
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError("expected inputs of one rank and type, got several")
    along = [value.shape[axis] for value in values]
    shape = list(_same_but(axis, [value.shape for value in values]))
    shape[axis] = None if None in along else sum(size for size in along if size is not None)
    known, parts = None, [value.known() for value in values]
    if all(part is not None for part in parts):
        known = np.concatenate([part for part in parts if part is not None], axis)
    bounds = [value.bounds() for value in values]
    inside = [pair for pair in bounds if pair]
    both = (min(low for low, _ in inside), max(high for _, high in inside)) if inside else None
    return Value(
        values[0].dtype,
        tuple(shape),
        known=known,
        bounds=both if len(inside) == len(bounds) else None,
        columns=tuple(bounds) if axis == len(shape) - 1 and set(along) == {1} else (),
    )


def _same_but(axis: int, shapes: list[Shape]) -> Shape:
    """The shape that all have apart from one axis."""
    result = []
    for index, sizes in enumerate(zip(*shapes, strict=True)):
        fixed = {size for size in sizes if size is not None}
        if index != axis and len(fixed) > 1:
            raise ValueError(f"expected shapes that differ in axis {axis} alone, got {shapes}")
        result.append(fixed.pop() if fixed else None)
    return tuple(result)


def _split(call: Call) -> list[Value]:
    value = call.value(0)
    axis, parts = call.axis(len(value.shape)), call.num_outputs
    size, sizes = value.shape[axis], call.attributes.get("split")
    if sizes is None and call.given(1) is not None:
        sizes = call.constants(1)
    if call.number("num_outputs", parts) != parts:
        raise ValueError(f"num_outputs: expected {parts}, got {call.number('num_outputs', 0)}")
    if sizes is None:
        whole = None if size is None else -(-size // parts)
        even = "num_outputs" in call.attributes
        if size is None or whole is None or (size % parts and not even):
            raise ValueError(f"expected an axis that {parts} parts divide, got {size}")
        sizes = [whole] * (parts - 1) + [size - whole * (parts - 1)]
    if len(sizes) != parts or any(part < 1 for part in sizes) or sum(sizes) != (size or sum(sizes)):
        raise ValueError(f"split: expected {parts} sizes of 1 or more for {size}, got {sizes}")
    return [
        Value(value.dtype, (*value.shape[:axis], part, *value.shape[axis + 1 :])) for part in sizes
    ]


def _slice(call: Call) -> Value:
    shape = list(call.value(0).shape)
    starts, ends = call.integers(1), call.integers(2)
    axes = call.constants(3) if call.given(3) else list(range(len(starts)))
    steps = call.constants(4) if call.given(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise ValueError("expected as many starts as ends, axes and steps, got others")
    if any(not 0 < abs(step) < _MOST_STEP for step in steps):
        raise ValueError(f"steps: expected 1 to {_MOST_STEP - 1}, or less than 0, got {steps}")
    axes = [place("axes", axis, len(shape)) for axis in axes]
    if len(set(axes)) != len(axes):
        raise ValueError(f"axes: expected each axis once, got {axes}")
    cut: list[slice] | None = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        if start is None or end is None or size is None:
            shape[axis], cut = None, None
            continue
        span = range(*slice(start, end, step).indices(size))
        shape[axis] = len(span)
        if cut is not None:
            stop = span.start + len(span) * step
            cut[axis] = slice(span.start, stop if stop >= 0 else None, step)
    known = None
    if cut is not None:
        places = tuple(cut)
        known = call.mapped(0, lambda numbers: numbers[places])
    return moved(call, tuple(shape), known)


def _expand(call: Call) -> Value:
    asked = tuple(call.integers(1))
    if any(size is not None and size < 0 for size in asked):
        raise ValueError(f"shape: expected sizes of 0 or more, got {list(asked)}")
    return Value(call.value(0).dtype, broadcast([call.value(0).shape, asked]))


def _tile(call: Call) -> Value:
    shape, repeats = call.value(0).shape, call.integers(1)
    if len(repeats) != len(shape) or any(times is not None and times < 1 for times in repeats):
        raise ValueError(f"repeats: expected {len(shape)} of 1 or more, got {repeats}")
    sizes = [
        None if size is None or times is None else size * times
        for size, times in zip(shape, repeats, strict=True)
    ]
    return Value(call.value(0).dtype, tuple(sizes))


def _pad(call: Call) -> Value:
    shape, mode = list(call.value(0).shape), call.text("mode", "constant")
    pads = call.constants(1)
    axes = call.axes(3, len(shape)) or list(range(len(shape)))
    if len(pads) != 2 * len(axes):
        raise ValueError(f"pads: expected two for each of {len(axes)} axes, got {pads}")
    for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
        size = shape[axis]
        if not before and not after:
            continue
        if size is None:
            raise ValueError(f"pads: expected none for axis {axis}, whose size is not known")
        most = max(before, after)
        fits = min(before, after) >= 0 and (mode != "reflect" or most < size)
        if mode != "constant" and not fits:
            raise ValueError(f"pads: expected 0 to {size - 1} with mode {mode}, got {pads}")
        shape[axis] = size + before + after
        if min(size + min(before, 0), size + min(after, 0), size + before + after) < 1:
            raise ValueError(f"pads: expected some of size {size} to be left, got {pads}")
    value = call.given(2)
    if value is not None and (value.dtype != call.value(0).dtype or value.size != 1):
        raise ValueError("constant_value: expected one number of the input's type, got others")
    return Value(call.value(0).dtype, tuple(shape))


def _blocks(call: Call) -> Value:
    shape, block = call.value(0).shape, call.number("blocksize", 0)
    if len(shape) != 4 or None in shape:
        raise ValueError(f"expected four axes of known size, got {list(shape)}")
    batch, channels, height, width = (size or 0 for size in shape)
    if call.op_type == "DepthToSpace":
        if channels % (block * block):
            raise ValueError(f"blocksize: expected one whose square divides {channels}")
        found = (batch, channels // block**2, height * block, width * block)
    else:
        if height % block or width % block:
            raise ValueError(f"blocksize: expected one that divides {height} and {width}")
        found = (batch, channels * block**2, height // block, width // block)
    return Value(call.value(0).dtype, found)


def _trilu(call: Call) -> Value:
    value = call.value(0)
    offset = call.constants(1) if call.given(1) else [0]
    if len(value.shape) < 2 or len(offset) != 1 or abs(offset[0]) >= _MOST_STEP:
        raise ValueError(f"expected a matrix and one offset, got {list(value.shape)}, {offset}")
    return Value(value.dtype, value.shape)


RULES: dict[str, Callable[[Call], Value | list[Value]]] = {
    **dict.fromkeys(_COMBINE.split(), _combine),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(_SAME.split(), _same),
    "ArgMax": _pick,
    "ArgMin": _pick,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "DepthToSpace": _blocks,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
