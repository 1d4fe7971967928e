"""One rule per operator: what it may be given, and the type and size of what it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from zsseg_rt.onnx.operations import ONNX_TYPES
from zsseg_rt.onnx.values import INT32, INT64, Call, Dim, Shape, Value, place

BOOL = 9
_INTEGERS = (2, 3, 4, 5, INT32, INT64, 12, 13)
_FLOATS = (1, 10, 11, 16)
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


def same(call: Call) -> Value:
    value = call.value(0)
    if call.kind in _WITH_AXIS:
        call.axis(len(value.shape), -1 if call.opset >= 13 or call.kind[0] == "L" else 1)
    if call.kind == "Identity":
        return value
    return Value(value.dtype, value.shape)


def cast(call: Call) -> Value:
    value, dtype = call.value(0), call.number("to", 0)
    if dtype not in (*_INTEGERS, *_FLOATS, BOOL):
        raise ValueError(f"to: expected a type of numbers, got {dtype}")
    return Value(dtype, value.shape)


def cast_like(call: Call) -> Value:
    return Value(call.value(1).dtype, call.value(0).shape)


_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def combine(call: Call) -> Value:
    values = [call.value(index) for index in range(len(call.inputs))]
    dtypes = {value.dtype for value in values}
    if len(dtypes) > 1 and call.kind != "Pow":
        raise ValueError(f"expected inputs of one type, got data types {sorted(dtypes)}")
    shape = broadcast([value.shape for value in values])
    dtype = BOOL if call.kind in _COMPARE else values[0].dtype
    if call.kind == "PRelu" and shape != values[0].shape and None not in shape:
        raise ValueError(f"slope: expected one that fits {list(values[0].shape)}, got {shape}")
    if values[0].dtype in _INTEGERS and call.kind in ("Div", "Mod"):
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


def where(call: Call) -> Value:
    condition, yes, no = (call.value(index) for index in range(3))
    if condition.dtype != BOOL or yes.dtype != no.dtype:
        raise ValueError(
            f"expected a condition and two inputs of one type, got data types {condition.dtype}, "
            f"{yes.dtype} and {no.dtype}"
        )
    return Value(yes.dtype, broadcast([condition.shape, yes.shape, no.shape]))


def clip(call: Call) -> Value:
    value = call.value(0)
    for index in (1, 2):
        limit = call.given(index)
        if limit is not None and (limit.dtype != value.dtype or limit.size != 1):
            raise ValueError(f"input {index}: expected one number of the input's type")
    return Value(value.dtype, value.shape)


def dropout(call: Call) -> list[Value]:
    value, training = call.value(0), call.given(2)
    if training is not None:
        raise ValueError("training_mode: expected nothing, got an input")
    return [Value(value.dtype, value.shape), Value(BOOL, value.shape)][: call.num_outputs]


def cumsum(call: Call) -> Value:
    value = call.value(0)
    axis = call.constants(1)
    if len(axis) != 1 or not -len(value.shape) <= axis[0] < len(value.shape):
        raise ValueError(f"axis: expected one of {len(value.shape)} axes, got {axis}")
    return Value(value.dtype, value.shape)


def reduce(call: Call) -> Value:
    value = call.value(0)
    axes, rank = call.axes(1, len(value.shape)), len(value.shape)
    if not axes:
        axes = [] if call.number("noop_with_empty_axes", 0) else list(range(rank))
    if call.number("keepdims", 1):
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    else:
        shape = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
    return Value(value.dtype, shape)


def pick(call: Call) -> Value:
    """ArgMax and ArgMin: places along an axis."""
    shape = list(call.value(0).shape)
    axis = call.axis(len(shape))
    size = shape[axis]
    bounds = (0, size - 1) if size else None
    shape[axis : axis + 1] = [1] if call.number("keepdims", 1) else []
    return Value(INT64, tuple(shape), between=bounds)


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


def gather(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    axis = call.axis(len(data.shape))
    _check_bounds(call, index, [data.shape[axis]], tokens=True)
    shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    return Value(data.dtype, shape)


def gather_elements(call: Call) -> Value:
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


def scatter_elements(call: Call) -> Value:
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
    if index.array is None:
        _check_bounds(call, index, sizes)
        return depth
    numbers = index.numbers().reshape(-1, depth)
    if not numbers.size:
        raise ValueError("indices: expected some, got none")
    for part, size in zip(numbers.T, sizes, strict=True):
        between = (int(part.min()), int(part.max()))
        _check_bounds(call, Value(index.dtype, (), between=between), [size])
    return depth


def gather_nd(call: Call) -> Value:
    data, index = call.value(0), call.value(1)
    batch = call.number("batch_dims", 0)
    fits = 0 <= batch < min(len(data.shape), len(index.shape))
    if not fits or data.shape[:batch] != index.shape[:batch]:
        raise ValueError(f"batch_dims: expected axes that both inputs share, got {batch}")
    depth = _tuple_sizes(call, data, index, batch)
    return Value(data.dtype, (*index.shape[:-1], *data.shape[batch + depth :]))


def scatter_nd(call: Call) -> Value:
    data, index, updates = (call.value(position) for position in range(3))
    depth = _tuple_sizes(call, data, index, 0)
    _check_updates(call, data, updates, (*index.shape[:-1], *data.shape[depth:]))
    return Value(data.dtype, data.shape)


def one_hot(call: Call) -> Value:
    index, values = call.value(0), call.value(2)
    depth = call.constants(1)
    if len(depth) != 1 or depth[0] < 1 or values.shape != (2,):
        raise ValueError(f"expected a depth of 1 or more and two values, got {depth}")
    _check_bounds(call, index, depth)
    axis = call.axis(len(index.shape), -1, extra=1)
    return Value(values.dtype, (*index.shape[:axis], depth[0], *index.shape[axis:]))


def top_k(call: Call) -> list[Value]:
    data, count = call.value(0), call.constants(1)
    axis = call.axis(len(data.shape), -1)
    size = data.shape[axis]
    if size is None or len(count) != 1 or not 1 <= count[0] <= size:
        raise ValueError(f"k: expected 1 to {size}, got {count}")
    shape = (*data.shape[:axis], count[0], *data.shape[axis + 1 :])
    return [Value(data.dtype, shape), Value(INT64, shape, between=(0, size - 1))]


def range_(call: Call) -> Value:
    dtype, numbers = call.value(0).dtype, []
    for index in range(3):
        value = call.value(index)
        if value.size != 1 or value.dtype != dtype:
            raise ValueError("expected three numbers of one type, got others")
        known = value.known if dtype in (INT32, INT64) else value.numbers()
        if known is None or None in known.reshape(-1):
            raise ValueError("expected constants or sizes, got computed numbers")
        numbers.append(float(known.reshape(-1)[0]))
    start, limit, step = numbers
    length = (limit - start) / step if step else math.nan
    if not all(map(math.isfinite, (start, limit, step, length))):
        raise ValueError(f"expected finite numbers and a step, got {numbers}")
    return Value(dtype, (max(0, math.ceil(length)),))


def constant_of_shape(call: Call) -> Value:
    shape, fill = tuple(call.integers(0)), call.attributes.get("value")
    if any(size is not None and size < 0 for size in shape):
        raise ValueError(f"expected sizes of 0 or more, got {list(shape)}")
    if fill is not None and fill.array.size != 1:
        raise ValueError(f"value: expected one number, got {list(fill.array.shape)}")
    return Value(1 if fill is None else ONNX_TYPES[fill.dtype], shape)


# --- elements that move ---


_MOST_STEP = 1 << 31


def shape(call: Call) -> Value:
    rank = len(call.value(0).shape)
    span = slice(call.number("start", 0), call.attributes.get("end")).indices(rank)
    return Value(INT64, (len(range(*span)),))


def size(call: Call) -> Value:
    return Value(INT64, ())


def reshape(call: Call) -> Value:
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
    return Value(call.value(0).dtype, tuple(shape))


def flatten(call: Call) -> Value:
    shape = call.value(0).shape
    axis = call.number("axis", 1)
    axis = axis if axis == len(shape) else place("axis", axis, len(shape))
    return Value(call.value(0).dtype, (_product(shape[:axis]), _product(shape[axis:])))


def _product(shape: Shape) -> Dim:
    return None if None in shape else math.prod(size for size in shape if size is not None)


def transpose(call: Call) -> Value:
    shape = call.value(0).shape
    axes = call.attributes.get("perm", list(range(len(shape)))[::-1])
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"perm: expected each of {len(shape)} axes once, got {axes}")
    return Value(call.value(0).dtype, tuple(shape[axis] for axis in axes))


def squeeze(call: Call) -> Value:
    shape = call.value(0).shape
    axes = call.axes(1, len(shape))
    if axes is None:
        if None in shape:
            raise ValueError(f"axes: expected them for shape {list(shape)}, got nothing")
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    if any(shape[axis] != 1 for axis in axes):  # OpenVINO does not look
        raise ValueError(f"axes: expected axes of size 1 of {list(shape)}, got {axes}")
    left = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    return Value(call.value(0).dtype, left)


def unsqueeze(call: Call) -> Value:
    shape = list(call.value(0).shape)
    count = len(call.attributes.get("axes") or call.constants(1))
    for axis in sorted(call.axes(1, len(shape) + count) or []):
        shape.insert(axis, 1)
    return Value(call.value(0).dtype, tuple(shape))


def concat(call: Call) -> Value:
    values = [call.value(index) for index in range(len(call.inputs))]
    axis = call.axis(len(values[0].shape))
    ranks, dtypes = {len(value.shape) for value in values}, {value.dtype for value in values}
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError("expected inputs of one rank and type, got several")
    along = [value.shape[axis] for value in values]
    shape = list(_same_but(axis, [value.shape for value in values]))
    shape[axis] = None if None in along else sum(size for size in along if size is not None)
    return Value(values[0].dtype, tuple(shape))


def _same_but(axis: int, shapes: list[Shape]) -> Shape:
    """The shape that all have apart from one axis."""
    result = []
    for index, sizes in enumerate(zip(*shapes, strict=True)):
        fixed = {size for size in sizes if size is not None}
        if index != axis and len(fixed) > 1:
            raise ValueError(f"expected shapes that differ in axis {axis} alone, got {shapes}")
        result.append(fixed.pop() if fixed else None)
    return tuple(result)


def split(call: Call) -> list[Value]:
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


def slice_(call: Call) -> Value:
    shape: list[Dim] = list(call.value(0).shape)
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
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        known = start is not None and end is not None and size is not None
        shape[axis] = len(range(*slice(start, end, step).indices(size))) if known else None  # type: ignore[arg-type]
    return Value(call.value(0).dtype, tuple(shape))


def expand(call: Call) -> Value:
    asked = tuple(call.integers(1))
    if any(size is not None and size < 0 for size in asked):
        raise ValueError(f"shape: expected sizes of 0 or more, got {list(asked)}")
    return Value(call.value(0).dtype, broadcast([call.value(0).shape, asked]))


def tile(call: Call) -> Value:
    shape, repeats = call.value(0).shape, call.integers(1)
    if len(repeats) != len(shape) or any(times is not None and times < 1 for times in repeats):
        raise ValueError(f"repeats: expected {len(shape)} of 1 or more, got {repeats}")
    sizes = [
        None if size is None or times is None else size * times
        for size, times in zip(shape, repeats, strict=True)
    ]
    return Value(call.value(0).dtype, tuple(sizes))


def pad(call: Call) -> Value:
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


def blocks(call: Call) -> Value:
    shape, block = call.value(0).shape, call.number("blocksize", 0)
    if len(shape) != 4 or None in shape:
        raise ValueError(f"expected four axes of known size, got {list(shape)}")
    batch, channels, height, width = (size or 0 for size in shape)
    if call.kind == "DepthToSpace":
        if channels % (block * block):
            raise ValueError(f"blocksize: expected one whose square divides {channels}")
        found = (batch, channels // block**2, height * block, width * block)
    else:
        if height % block or width % block:
            raise ValueError(f"blocksize: expected one that divides {height} and {width}")
        found = (batch, channels * block**2, height // block, width // block)
    return Value(call.value(0).dtype, found)


def trilu(call: Call) -> Value:
    value = call.value(0)
    offset = call.constants(1) if call.given(1) else [0]
    if len(value.shape) < 2 or len(offset) != 1 or abs(offset[0]) >= _MOST_STEP:
        raise ValueError(f"expected a matrix and one offset, got {list(value.shape)}, {offset}")
    return Value(value.dtype, value.shape)


# --- products, convolutions, pools, norms, resizing, quantisation ---

_MOST_SCALE = 1 << 16


def matmul(call: Call) -> Value:
    a, b = call.value(0), call.value(1)
    left, right = a.shape, b.shape
    if not left or not right or a.dtype != b.dtype:
        raise ValueError(f"expected two matrices of one type, got {list(left)}, {list(right)}")
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    _check_equal("inner sizes", left[-1], right[-2] if len(right) > 1 else right[0])
    return Value(a.dtype, (*broadcast([left[:-2], right[:-2]]), *rows, *columns))


def _check_equal(what: str, a: Dim, b: Dim) -> None:
    if a != b and a is not None and b is not None:
        raise ValueError(f"{what}: expected equal ones, got {a} and {b}")


def gemm(call: Call) -> Value:
    a, b, c = call.value(0), call.value(1), call.given(2)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.dtype != b.dtype:
        raise ValueError(f"expected two matrices, got {list(a.shape)} and {list(b.shape)}")
    left = a.shape[::-1] if call.number("transA", 0) else a.shape
    right = b.shape[::-1] if call.number("transB", 0) else b.shape
    _check_equal("inner sizes", left[1], right[0])
    shape = (left[0], right[1])
    if c is not None and len(broadcast([shape, c.shape])) > 2:
        raise ValueError(f"bias: expected one for {list(shape)}, got {list(c.shape)}")
    return Value(a.dtype, shape)


def einsum(call: Call) -> Value:
    equation = call.text("equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    parts = terms.split(",")
    letters = "".join((*parts, result))
    if len(parts) != len(call.inputs) or not arrow or not (letters.isascii() and letters.isalpha()):
        raise ValueError(f"equation: expected terms of letters and a result, got {equation!r}")
    sizes: dict[str, Dim] = {}
    for index, term in enumerate(parts):
        shape = call.value(index).shape
        if len(shape) != len(term) or len(set(term)) != len(term):
            raise ValueError(f"equation: expected {len(shape)} letters, each once, got {term!r}")
        for letter, size in zip(term, shape, strict=True):
            _check_equal(f"sizes of {letter}", sizes.setdefault(letter, size), size)
            sizes[letter] = size if sizes[letter] is None else sizes[letter]
    if len(set(result)) != len(result) or not set(result) <= set(sizes):
        raise ValueError(f"equation: expected letters of the terms in the result, got {result!r}")
    return Value(call.value(0).dtype, tuple(sizes[letter] for letter in result))


def conv(call: Call) -> Value:
    data, weight, bias = call.value(0), call.value(1), call.given(2)
    rank, groups = len(data.shape) - 2, call.number("group", 1)
    if not 1 <= rank <= 3 or len(weight.shape) != rank + 2 or None in weight.shape:
        raise ValueError(
            f"expected an image and as many weights, got {list(data.shape)}, {list(weight.shape)}"
        )
    flipped = call.kind == "ConvTranspose"
    first, second = (size or 0 for size in weight.shape[:2])
    inside, made = (first, second * groups) if flipped else (second * groups, first)
    if data.shape[1] != inside or made % groups or inside % groups or data.dtype != weight.dtype:
        raise ValueError(
            f"group {groups}: expected channels that fit, got {list(data.shape)} and weights "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != (made,):
        raise ValueError(f"bias: expected {made} numbers, got shape {list(bias.shape)}")
    kernel = [size or 0 for size in weight.shape[2:]]
    if call.attributes.get("kernel_shape", kernel) != kernel:
        raise ValueError(f"kernel_shape: expected {kernel}, got {call.attributes['kernel_shape']}")
    window = _windows_transposed if flipped else _windows
    return Value(data.dtype, (data.shape[0], made, *window(call, data.shape[2:], kernel)))


def _steps(call: Call, name: str, count: int, default: int, fewest: int = 1) -> list[int]:
    """One or more numbers for each axis of an image."""
    found: list[int] = call.attributes.get(name, [default] * count)
    if len(found) != count or min(found) < fewest:
        raise ValueError(f"{name}: expected {count} of {fewest} or more, got {found}")
    return found


def _windows(call: Call, sizes: Shape, kernel: list[int]) -> list[Dim]:
    """How often a window fits, along each axis."""
    rank, mode = len(sizes), call.text("auto_pad", "NOTSET")
    strides, dilations = _steps(call, "strides", rank, 1), _steps(call, "dilations", rank, 1)
    pads = _steps(call, "pads", 2 * rank, 0, 0)
    found: list[Dim] = []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if size is None or reach < 1:
            raise ValueError(f"expected an image and a kernel of known size, got {list(sizes)}")
        padded = size + (pads[axis] + pads[axis + rank] if mode == "NOTSET" else 0)
        count = (padded - reach) / strides[axis]
        if mode.startswith("SAME"):
            count = (size - 1) / strides[axis]
        elif padded < reach:
            raise ValueError(f"kernel: expected at most {padded} pixels, got {reach}")
        if "Pool" in call.kind and max(pads[axis], pads[axis + rank]) >= reach:
            raise ValueError(f"pads: expected less than the kernel's {reach} pixels, got {pads}")
        steps = math.ceil(count) if call.number("ceil_mode", 0) else math.floor(count)
        if call.number("ceil_mode", 0) and steps * strides[axis] >= size + pads[axis]:
            steps -= mode == "NOTSET"  # a window that would begin in the padding behind
        found.append(steps + 1)
    return found


def _windows_transposed(call: Call, sizes: Shape, kernel: list[int]) -> list[Dim]:
    rank, mode = len(sizes), call.text("auto_pad", "NOTSET")
    strides, dilations = _steps(call, "strides", rank, 1), _steps(call, "dilations", rank, 1)
    pads, more = _steps(call, "pads", 2 * rank, 0, 0), _steps(call, "output_padding", rank, 0, 0)
    if mode != "NOTSET" or None in sizes:
        raise ValueError(f"auto_pad: expected NOTSET and known sizes, got {mode} and {sizes}")
    found: list[Dim] = []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        made = (size or 0) * strides[axis] - strides[axis] + more[axis] + reach
        made -= pads[axis] + pads[axis + rank]
        if made < 1 or more[axis] >= max(strides[axis], dilations[axis]):
            raise ValueError(f"pads: expected an image to be left, got {pads} and {more}")
        found.append(made)
    return found


def pool(call: Call) -> Value:
    data = call.value(0)
    rank = len(data.shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"expected an image, got shape {list(data.shape)}")
    kernel = _steps(call, "kernel_shape", rank, 0)
    return Value(data.dtype, (*data.shape[:2], *_windows(call, data.shape[2:], kernel)))


def global_pool(call: Call) -> Value:
    data = call.value(0)
    if not 3 <= len(data.shape) <= 5:
        raise ValueError(f"expected an image, got shape {list(data.shape)}")
    return Value(data.dtype, (*data.shape[:2], *[1] * (len(data.shape) - 2)))


def layer_norm(call: Call) -> Value:
    data = call.value(0)
    axis = call.axis(len(data.shape), -1)
    for index in range(1, len(call.inputs)):
        given = call.given(index)
        if given is not None and broadcast([data.shape[axis:], given.shape]) != data.shape[axis:]:
            raise ValueError(
                f"input {index}: expected one for {list(data.shape[axis:])}, got "
                f"{list(given.shape)}"
            )
    return Value(data.dtype, data.shape)


def channel_norm(call: Call) -> Value:
    """BatchNormalization, InstanceNormalization and GroupNormalization."""
    data = call.value(0)
    channels = data.shape[1] if len(data.shape) > 1 else None
    given = [call.value(index).shape for index in range(1, len(call.inputs))]
    groups = call.number("num_groups", 1)
    if channels is None or any(shape != (channels,) for shape in given) or groups < 1:
        raise ValueError(f"expected numbers for each of {channels} channels, got {given}")
    if channels % groups or (call.kind[0] != "B" and len(data.shape) < 3):
        raise ValueError(f"num_groups: expected one that divides {channels}, got {groups}")
    if call.number("training_mode", 0):
        raise ValueError("training_mode: expected 0, got 1")
    return Value(data.dtype, data.shape)


def lrn(call: Call) -> Value:
    data = call.value(0)
    if len(data.shape) < 3 or not 1 <= call.number("size", 0) <= _MOST_SCALE:
        raise ValueError(f"size: expected 1 or more, for an image, got {call.number('size', 0)}")
    return Value(data.dtype, data.shape)


def resize(call: Call) -> Value:
    data, scales, sizes = call.value(0), call.given(2), call.given(3)
    rank = len(data.shape)
    axes = call.axes(9, rank) or list(range(rank))
    by_size = sizes is not None and sizes.shape != (0,)
    if by_size == (scales is not None and scales.shape != (0,)):
        raise ValueError("expected either scales or sizes, got both or neither")
    if not 3 <= rank <= 5:
        raise ValueError(f"expected an image, got shape {list(data.shape)}")
    shape = list(data.shape)
    if by_size:
        found: list[Dim] = call.integers(3)
    else:
        found = _scaled(call, [shape[axis] for axis in axes])
    if len(found) != len(axes) or any(size is not None and size < 1 for size in found):
        raise ValueError(f"expected {len(axes)} sizes of 1 or more, got {found}")
    for axis, size in zip(axes, found, strict=True):
        shape[axis] = size
    return Value(data.dtype, tuple(shape))


def _scaled(call: Call, sizes: list[Dim]) -> list[Dim]:
    factors = [float(number) for number in call.value(2).numbers().reshape(-1)]
    if len(factors) != len(sizes) or not all(0 < f <= _MOST_SCALE for f in factors):
        raise ValueError(
            f"scales: expected {len(sizes)} numbers up to {_MOST_SCALE}, got {factors}"
        )
    return [
        size if factor == 1 else None if size is None else math.floor(size * factor)
        for size, factor in zip(sizes, factors, strict=True)
    ]


def quantise(call: Call) -> Value:
    data, scale, zero = call.value(0), call.value(1), call.given(2)
    backwards = call.kind == "DequantizeLinear"
    stored = data.dtype if backwards else zero.dtype if zero else call.number("output_dtype", 2)
    if stored not in (2, 3, 17, 21, 22) + ((6,) if backwards else ()) or scale.dtype not in (1, 10):
        raise ValueError(f"expected 8 or 4 bits and a float scale, got {stored}, {scale.dtype}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != stored):
        raise ValueError("zero_point: expected the scale's shape and the stored type, got others")
    if call.number("block_size", 0):
        raise ValueError("block_size: expected 0, got blocks")
    if scale.shape:
        size = data.shape[call.axis(len(data.shape), 1)] if data.shape else None
        if scale.shape not in ((size,), (1,)) or size is None:
            raise ValueError(f"scale: expected one or {size} numbers, got {list(scale.shape)}")
    return Value(scale.dtype if backwards else stored, data.shape)


def attention(call: Call) -> Value:
    q, k, v = (call.value(index) for index in range(3))
    shapes = [q.shape, k.shape, v.shape]
    if any(len(shape) != 4 or None in shape for shape in shapes) or q.dtype != k.dtype != v.dtype:
        raise ValueError(f"expected [B, H, N, D] of known sizes, got {shapes}")
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(f"expected shapes that fit, got {shapes}")
    scores, mask = (*q.shape[:3], k.shape[2]), call.given(3)
    if mask is not None and broadcast([scores, mask.shape]) != scores:
        raise ValueError(f"attn_mask: expected one for {list(scores)}, got {list(mask.shape)}")
    return Value(q.dtype, (*q.shape[:3], v.shape[3]))
