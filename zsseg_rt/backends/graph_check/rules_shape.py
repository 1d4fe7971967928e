"""Operators that move elements: none computes with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from zsseg_rt.backends.graph_check.rules_elementwise import broadcast
from zsseg_rt.backends.graph_check.value import (
    INT64,
    Call,
    Dim,
    Known,
    Shape,
    Value,
    full,
    known_size,
    place,
)

_MOST_STEP = 1 << 31


def _moved(call: Call, shape: Shape, known: Known | None = None) -> Value:
    """A result whose elements are the first input's."""
    value = call.value(0)
    return Value(value.dtype, shape, known=known, bounds=value.bounds(), source=value.source)


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
    return _moved(call, sizes, known)


def _flatten(call: Call) -> Value:
    shape = call.value(0).shape
    axis = call.number("axis", 1)
    axis = axis if axis == len(shape) else place("axis", axis, len(shape))
    return _moved(call, (_product(shape[:axis]), _product(shape[axis:])))


def _product(shape: Shape) -> Dim:
    return None if None in shape else math.prod(size for size in shape if size is not None)


def _transpose(call: Call) -> Value:
    shape = call.value(0).shape
    axes = call.attributes.get("perm", list(range(len(shape)))[::-1])
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"perm: expected each of {len(shape)} axes once, got {axes}")
    known = call.mapped(0, lambda numbers: numbers.transpose(axes))
    return _moved(call, tuple(shape[axis] for axis in axes), known)


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
    return _moved(call, left, known)


def _unsqueeze(call: Call) -> Value:
    shape = list(call.value(0).shape)
    count = len(call.attributes.get("axes") or call.constants(1))
    for axis in sorted(call.axes(1, len(shape) + count) or []):
        shape.insert(axis, 1)
    known = call.mapped(0, lambda numbers: numbers.reshape(known_size(tuple(shape))))
    return _moved(call, tuple(shape), known)


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
    results, begin = [], 0
    for part in sizes:
        shape = (*value.shape[:axis], part, *value.shape[axis + 1 :])
        cut = (slice(None),) * axis + (slice(begin, begin + part),)
        known = value.known()
        results.append(_moved(call, shape, None if known is None else known[cut]))
        begin += part
    return results


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
    return _moved(call, tuple(shape), known)


def _expand(call: Call) -> Value:
    asked = tuple(call.integers(1))
    if any(size is not None and size < 0 for size in asked):
        raise ValueError(f"shape: expected sizes of 0 or more, got {list(asked)}")
    shape = broadcast([call.value(0).shape, asked])
    known = None
    if full(shape, 0) is not None:
        known = call.mapped(0, lambda numbers: np.broadcast_to(numbers, known_size(shape)))
    return _moved(call, shape, known)


def _tile(call: Call) -> Value:
    shape, repeats = call.value(0).shape, call.integers(1)
    if len(repeats) != len(shape) or any(times is not None and times < 1 for times in repeats):
        raise ValueError(f"repeats: expected {len(shape)} of 1 or more, got {repeats}")
    sizes = [
        None if size is None or times is None else size * times
        for size, times in zip(shape, repeats, strict=True)
    ]
    return _moved(call, tuple(sizes))


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
    "Concat": _concat,
    "DepthToSpace": _blocks,
    "Expand": _expand,
    "Flatten": _flatten,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
