"""One rule per operator: what it may be given, and the type and size of what it makes.

A rule takes a call and its inputs, None where one was left out. It returns its results, or the
shape of one of the first input's type. It raises what it expected; ``check.Flow`` adds the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.onnx import runs
from zsseg_rt.onnx.operations import DTYPES

Dim = Any
"""The size of an axis; a word, or None, if it is known only at run time."""
Shape = tuple[Dim, ...]

PLACES = ("int32", "int64")
_INTEGERS = (*PLACES, "uint8", "int8", "uint16", "int16", "uint32", "uint64")
_FLOATS = ("float32", "float16", "float64", "bfloat16")
_READABLE = (*PLACES, "float32", "float64")
MOST_KNOWN = 1024  # no shape, padding or list of axes has more numbers
_LARGEST = 1 << 31  # OpenVINO computes integers in 32 bits
_MOST_SCALE = 1 << 16


def fixed(*sizes: Dim) -> bool:
    """Whether all sizes are known before a run."""
    return all(isinstance(size, int) for size in sizes)


def need(fits: object, expected: str) -> None:
    """Refuse a node that does not fit."""
    if not fits:
        raise ValueError(expected)


@dataclass(slots=True, eq=False)
class Value:
    """A tensor before a graph runs: its type, its shape and, of few, numbers."""

    dtype: str
    shape: Shape
    array: npt.NDArray[Any] | None = None  # Its content, if it is a constant
    between: tuple[int, int] | None = None  # Lowest and highest of its integers, if known
    source: str = ""  # The input of the graph whose integers it holds
    known: npt.NDArray[Any] | None = None  # Its few integers as objects; None: known at run time

    @property
    def size(self) -> int:
        """Elements, where sizes that are not known count as one."""
        return math.prod(size for size in self.shape if isinstance(size, int))

    def numbers(self) -> npt.NDArray[Any]:
        """The content of a constant of float32, float64, int32 or int64."""
        if self.array is None or self.dtype not in _READABLE:
            raise ValueError("expected a constant of float32, int32 or int64")
        return self.array

    def integers(self) -> list[Dim]:
        """A list of integers, or of sizes that are known only at run time."""
        is_list = self.dtype in PLACES and len(self.shape) <= 1 and fixed(*self.shape)
        need(is_list, "expected a list of integers")
        if self.known is None:
            raise ValueError("expected constants or sizes, not computed numbers")
        return list(self.known.reshape(-1))

    def constants(self) -> list[int]:
        """A list of integers, which have to be known."""
        need(fixed(*self.integers()), "expected constants, not sizes known at run time")
        return self.integers()


def constant(dtype: str, array: npt.NDArray[Any]) -> Value:
    """A constant with its content."""
    value = Value(dtype, array.shape, array)
    if dtype in PLACES and array.size <= MOST_KNOWN:
        value.known = array.astype(object)
    if dtype in PLACES and array.size and -_LARGEST <= array.min() <= array.max() < _LARGEST:
        value.between = (int(array.min()), int(array.max()))
    return value


Operand = Value | None
"""An input that may be left out."""


@dataclass(slots=True, eq=False)
class Call:
    """A node without its inputs."""

    kind: str
    opset: int
    attributes: Mapping[str, Any]
    num_outputs: int
    token_rows: dict[str, int]  # Of the graph's inputs, the rows that their integers choose from

    def number(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        return str(self.attributes.get(name, default.encode()).decode("ascii", "replace"))

    def axis(self, rank: int, default: int = 0) -> int:
        """The attribute ``axis``, counted from the front."""
        return _place(self.number("axis", default), rank)

    def axes(self, operand: Operand, rank: int) -> list[int] | None:
        """Axes in an attribute, as before operator set 13 or 18, or in an input."""
        axes = self.attributes.get("axes")
        if axes is None and operand is not None:
            axes = operand.constants()
        return None if axes is None else _places(axes, rank)


def _place(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    need(-rank <= axis < rank, f"axis {axis}: expected one of {rank} axes")
    return axis % rank


def _places(axes: Sequence[int], rank: int) -> list[int]:
    places = [_place(axis, rank) for axis in axes]
    need(len(set(places)) == len(places), "axes: expected each axis once")
    return places


def broadcast(*shapes: Shape) -> Shape:
    """The shape of a result whose operands are repeated along axes of size 1."""
    result: list[Dim] = []
    for sizes in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        wide = [size for size in sizes if size != 1]
        need(len({size for size in wide if fixed(size)}) <= 1, "expected shapes that fit")
        result.append(_one(*wide) if wide else 1)
    return tuple(result[::-1])


def _one(*sizes: Dim) -> Dim:
    """The size of axes that are equally long, as far as any is known."""
    known = {size for size in sizes if fixed(size)} or set(sizes)
    return known.pop() if len(known) == 1 else None


def _put(shape: Shape, axis: int, *sizes: Dim) -> Shape:
    """The shape with other sizes in an axis's place."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


# --- number by number ---


def same(call: Call, x: Value, *others: Operand) -> Shape:
    return x.shape


def along(call: Call, x: Value) -> Shape:
    call.axis(len(x.shape), 1 if "Softmax" in call.kind and call.opset < 13 else -1)
    return x.shape


def cast(call: Call, x: Value) -> Value:
    dtype = DTYPES.get(call.number("to"), "")
    need(dtype in (*_INTEGERS, *_FLOATS, "bool"), "to: expected a type of numbers")
    return Value(dtype, x.shape)


def combine(call: Call, *values: Value) -> Shape:
    need(len({value.dtype for value in values}) == 1, "expected inputs of one type")
    return broadcast(*(value.shape for value in values))


def compare(call: Call, a: Value, b: Value) -> Value:
    return Value("bool", combine(call, a, b))


def prelu(call: Call, x: Value, slope: Value) -> Shape:
    shape = combine(call, x, slope)
    need(shape == x.shape or not fixed(*shape), "slope: expected one that fits the input")
    return shape


def divide(call: Call, x: Value, divisor: Value) -> Shape:
    """Integers divided by zero, or the lowest by -1, end the process."""
    if x.dtype in _INTEGERS:
        need((divisor.between or (0, 0))[0] >= 1, "divisor: expected constants of 1 or more")
        need(not call.number("fmod"), "fmod: expected 0 for integers")
    return combine(call, x, divisor)


def where(call: Call, condition: Value, yes: Value, no: Value) -> Value:
    fits = condition.dtype == "bool" and yes.dtype == no.dtype
    need(fits, "expected a condition and two inputs of one type")
    return Value(yes.dtype, broadcast(condition.shape, yes.shape, no.shape))


def clip(call: Call, x: Value, *limits: Operand) -> Shape:
    for limit in limits:
        fits = limit is None or (limit.dtype == x.dtype and limit.size == 1)
        need(fits, "limit or value: expected one number of the input's type")
    return x.shape


def cumsum(call: Call, x: Value, axis: Value) -> Shape:
    need(len(_places(axis.constants(), len(x.shape))) == 1, "axis: expected one")
    return x.shape


def reduce(call: Call, x: Value, operand: Operand = None) -> Shape:
    axes = call.axes(operand, len(x.shape))
    if not axes:
        axes = [] if call.number("noop_with_empty_axes") else list(range(len(x.shape)))
    left = (1,) if call.number("keepdims", 1) else ()
    sizes = (left if axis in axes else (size,) for axis, size in enumerate(x.shape))
    return tuple(size for each in sizes for size in each)


def pick(call: Call, x: Value) -> Value:
    """ArgMax and ArgMin: places along an axis."""
    axis = call.axis(len(x.shape))
    size, left = x.shape[axis], (1,) if call.number("keepdims", 1) else ()
    between = (0, size - 1) if fixed(size) else None
    return Value("int64", _put(x.shape, axis, *left), between=between)


# --- indices ---


def _check_bounds(call: Call, index: Value, sizes: Sequence[Dim], *, tokens: bool = False) -> None:
    """Check that every index is inside the smallest of the axes that it may point into."""
    need(index.dtype in PLACES, "indices: expected int32 or int64")
    need(fixed(*sizes), "indices: expected an axis of known size")
    size, bounds = min(sizes), index.between
    if bounds is None and tokens and index.source and size:
        call.token_rows[index.source] = min(size, call.token_rows.get(index.source, size))
        return
    if bounds is None or not -size <= bounds[0] <= bounds[1] < size:
        raise ValueError(
            f"indices: expected constants, or places of ArgMax, ArgMin or TopK, from {-size} to "
            f"{size - 1}, not {'computed numbers' if bounds is None else bounds}"
        )


def gather(call: Call, x: Value, index: Value) -> Shape:
    axis = call.axis(len(x.shape))
    _check_bounds(call, index, [x.shape[axis]], tokens=True)
    return _put(x.shape, axis, *index.shape)


def gather_elements(call: Call, x: Value, index: Value) -> Shape:
    """No other axis of the indices is longer than the input's."""
    axis = call.axis(len(x.shape))
    fits = len(index.shape) == len(x.shape) and all(
        at == axis or (fixed(*pair) and pair[1] <= pair[0])
        for at, pair in enumerate(zip(x.shape, index.shape, strict=True))
    )
    need(fits, "indices: expected a shape within the input's")
    _check_bounds(call, index, [x.shape[axis]])
    return index.shape


def gather_nd(call: Call, x: Value, index: Value) -> Shape:
    batch = call.number("batch_dims")
    fits = 0 <= batch < min(len(x.shape), len(index.shape))
    fits = fits and x.shape[:batch] == index.shape[:batch]
    need(fits, "batch_dims: expected axes that both inputs share")
    depth = index.shape[-1]
    fits = fixed(*index.shape) and 0 < depth <= len(x.shape) - batch
    need(fits, "indices: expected tuples for the input's axes")
    sizes = x.shape[batch : batch + depth]
    if index.array is None:
        _check_bounds(call, index, sizes)
    else:
        numbers = index.numbers().reshape(-1, depth)
        need(numbers.size, "indices: expected some")
        for part, size in zip(numbers.T, sizes, strict=True):
            between = (int(part.min()), int(part.max()))
            _check_bounds(call, Value(index.dtype, (), between=between), [size])
    return (*index.shape[:-1], *x.shape[batch + depth :])


def scatter_nd(call: Call, x: Value, index: Value, updates: Value) -> Shape:
    shape = gather_nd(call, x, index)
    fits = updates.dtype == x.dtype and updates.shape == shape and fixed(*shape)
    need(fits, f"updates: expected {list(shape)} of the input's type")
    return x.shape


def top_k(call: Call, x: Value, count: Value) -> list[Value]:
    counts, axis = count.constants(), call.axis(len(x.shape), -1)
    size = x.shape[axis]
    fits = fixed(size) and len(counts) == 1 and 1 <= counts[0] <= size
    need(fits, f"k: expected 1 to {size}")
    shape = _put(x.shape, axis, counts[0])
    return [Value(x.dtype, shape), Value("int64", shape, between=(0, size - 1))]


def range_(call: Call, *limits: Value) -> Value:
    dtype, numbers = limits[0].dtype, []
    for value in limits:
        need(value.size == 1 and value.dtype == dtype, "expected three numbers of one type")
        content = value.known if dtype in PLACES else value.numbers()
        if content is None or (dtype in PLACES and not fixed(*content.reshape(-1))):
            raise ValueError("expected constants or sizes, not computed numbers")
        numbers.append(float(content.reshape(-1)[0]))
    start, limit, step = numbers
    length = (limit - start) / step if step else math.nan
    need(all(map(math.isfinite, (*numbers, length))), "expected finite numbers and a step")
    return Value(dtype, (max(0, math.ceil(length)),))


def constant_of_shape(call: Call, sizes: Value) -> Value:
    fill = call.attributes.get("value")
    need(fill is None or fill.array.size == 1, "value: expected one number")
    return Value("float32" if fill is None else fill.dtype, sizes_of(sizes, 0))


def sizes_of(value: Value, least: int) -> Shape:
    sizes = value.integers()
    fits = all(not fixed(size) or size >= least for size in sizes)
    need(fits, f"expected sizes of {least} or more, not {sizes}")
    return tuple(sizes)


# --- elements that move ---


def shape(call: Call, x: Value) -> Value:
    """Shape and Size, with what is known of their integers."""
    if call.kind == "Size":
        count = np.array(math.prod(x.shape), object) if fixed(*x.shape) else None
        return Value("int64", (), known=count)
    sizes = x.shape[slice(call.number("start"), call.attributes.get("end"))]
    return Value("int64", (len(sizes),), known=np.array(sizes, object))


def reshape(call: Call, x: Value, sizes: Value) -> Shape:
    asked = sizes.integers()
    if not call.number("allowzero"):
        need(0 not in asked[len(x.shape) :], "shape: expected 0 only for the input's axes")
        asked = [x.shape[axis] if size == 0 else size for axis, size in enumerate(asked)]
    fits = all(not fixed(size) or size >= -1 for size in asked) and asked.count(-1) <= 1
    need(fits, "shape: expected sizes and at most one -1")
    shape: list[Dim] = [None if size == -1 else size for size in asked]
    if fixed(*x.shape):
        elements = math.prod(x.shape)
        others = math.prod(size for size in shape if fixed(size))
        fits = elements == others if fixed(*shape) or not others else elements % others == 0
        need(fits, "shape: expected one for as many elements")
        if sum(not fixed(size) for size in shape) == 1:
            rest = elements // others if others else 0
            return tuple(size if fixed(size) else rest for size in shape)
    return tuple(shape)


def flatten(call: Call, x: Value) -> Shape:
    axis, rank = call.number("axis", 1), len(x.shape)
    axis = axis if axis == rank else _place(axis, rank)
    halves = (x.shape[:axis], x.shape[axis:])
    return tuple(math.prod(half) if fixed(*half) else None for half in halves)


def transpose(call: Call, x: Value) -> Shape:
    places = list(range(len(x.shape)))
    axes = call.attributes.get("perm", places[::-1])
    need(sorted(axes) == places, "perm: expected each axis once")
    return tuple(x.shape[axis] for axis in axes)


def squeeze(call: Call, x: Value, operand: Operand = None) -> Shape:
    axes = call.axes(operand, len(x.shape))
    if axes is None:
        need(fixed(*x.shape), "axes: expected them, as sizes are open")
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    fits = all(x.shape[axis] == 1 for axis in axes)  # OpenVINO does not look
    need(fits, "axes: expected axes of size 1")
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


def unsqueeze(call: Call, x: Value, operand: Operand = None) -> Shape:
    axes = call.attributes.get("axes") or (operand.constants() if operand else None)
    if axes is None:
        raise ValueError("axes: expected some")
    sizes = list(x.shape)
    for axis in sorted(_places(axes, len(sizes) + len(axes))):
        sizes.insert(axis, 1)
    return tuple(sizes)


def concat(call: Call, *values: Value) -> Shape:
    need("axis" in call.attributes, "axis: expected one")
    shapes, axis = [value.shape for value in values], call.axis(len(values[0].shape))
    fits = len(set(map(len, shapes))) == len({value.dtype for value in values}) == 1
    need(fits, "expected inputs of one rank and type")
    shape: list[Dim] = []
    for at, sizes in enumerate(zip(*shapes, strict=True)):
        lone = len({size for size in sizes if fixed(size)}) <= 1
        need(at == axis or lone, f"expected sizes that differ in axis {axis} alone")
        shape.append(_one(*sizes))
    along = [each[axis] for each in shapes]
    return _put(tuple(shape), axis, sum(along) if fixed(*along) else None)


def split(call: Call, x: Value, operand: Operand = None) -> list[Value]:
    axis, parts = call.axis(len(x.shape)), call.num_outputs
    size, sizes = x.shape[axis], call.attributes.get("split")
    if sizes is None and operand is not None:
        sizes = operand.constants()
    need(call.number("num_outputs", parts) == parts, f"num_outputs: expected {parts}")
    if sizes is None:
        even = fixed(size) and (size % parts == 0 or "num_outputs" in call.attributes)
        need(even, f"expected an axis that {parts} parts divide")
        whole = -(-size // parts)
        sizes = [whole] * (parts - 1) + [size - whole * (parts - 1)]
    fits = len(sizes) == parts and min(sizes) >= 1 and (not fixed(size) or sum(sizes) == size)
    need(fits, f"split: expected {parts} sizes of 1 or more for {size}")
    return [Value(x.dtype, _put(x.shape, axis, part)) for part in sizes]


def slice_(call: Call, x: Value, *operands: Operand) -> Shape:
    first, last, along, by = (*operands, None, None)[:4]
    assert first is not None
    assert last is not None
    starts, ends, sizes = first.integers(), last.integers(), list(x.shape)
    axes = along.constants() if along else list(range(len(starts)))
    steps = by.constants() if by else [1] * len(starts)
    fits = len(starts) == len(ends) == len(axes) == len(steps)
    need(fits, "expected as many starts as ends, axes and steps")
    fits = all(0 < abs(step) < _LARGEST for step in steps)
    need(fits, f"steps: expected 1 to {_LARGEST - 1}, or less than 0")
    for *span, axis in zip(starts, ends, steps, _places(axes, len(sizes)), strict=True):
        is_fixed = fixed(*span, sizes[axis])
        sizes[axis] = len(range(*slice(*span).indices(sizes[axis]))) if is_fixed else None
    return tuple(sizes)


def tile(call: Call, x: Value, repeats: Value) -> Shape:
    times = sizes_of(repeats, 1)
    need(len(times) == len(x.shape), "repeats: expected one for each axis")
    pairs = zip(x.shape, times, strict=True)
    return tuple(pair[0] * pair[1] if fixed(*pair) else None for pair in pairs)


def pad(call: Call, x: Value, around: Value, value: Operand = None, along: Operand = None) -> Shape:
    sizes, mode, pads = list(x.shape), call.text("mode", "constant"), around.constants()
    axes = call.axes(along, len(sizes)) or list(range(len(sizes)))
    need(len(pads) == 2 * len(axes), f"pads: expected two for each of {len(axes)} axes")
    for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
        size = sizes[axis]
        if not before and not after:
            continue
        need(fixed(size), f"pads: expected none for axis {axis}, whose size is not known")
        fits = min(before, after) >= 0 and (mode != "reflect" or max(before, after) < size)
        need(mode == "constant" or fits, f"pads: expected 0 to {size - 1} with mode {mode}")
        sizes[axis] = size + before + after
        left = min(size + min(before, 0), size + min(after, 0), sizes[axis])
        need(left >= 1, f"pads: expected some of size {size} to be left")
    return clip(call, Value(x.dtype, tuple(sizes)), value)


def depth_to_space(call: Call, x: Value) -> Shape:
    batch, channels, height, width = _image(x, (4,))
    block = call.number("blocksize")
    fits = fixed(*x.shape) and block and channels % block**2 == 0
    need(fits, "blocksize: expected one whose square divides the channels")
    return batch, channels // block**2, height * block, width * block


def space_to_depth(call: Call, x: Value) -> Shape:
    batch, channels, height, width = _image(x, (4,))
    block = call.number("blocksize")
    fits = fixed(*x.shape) and block and height % block == width % block == 0
    need(fits, "blocksize: expected one that divides the sides")
    return batch, channels * block**2, height // block, width // block


def _image(x: Value, ranks: Sequence[int] = (3, 4, 5)) -> Shape:
    need(len(x.shape) in ranks, "expected an image")
    return x.shape


def trilu(call: Call, x: Value, diagonal: Operand = None) -> Shape:
    offset = diagonal.constants() if diagonal else [0]
    fits = len(x.shape) >= 2 and len(offset) == 1 and abs(offset[0]) < _LARGEST
    need(fits, "expected a matrix and one offset")
    return x.shape


# --- products, convolutions, pools, norms, resizing, quantisation ---


def _check_equal(what: str, a: Dim, b: Dim) -> None:
    need(a == b or not fixed(a, b), f"{what}: expected equal ones, not {a} and {b}")


def matmul(call: Call, a: Value, b: Value) -> Shape:
    left, right = a.shape, b.shape
    need(left and right and a.dtype == b.dtype, "expected two matrices of one type")
    _check_equal("inner sizes", left[-1], right[-2:][0])
    columns = right[-1:] if len(right) > 1 else ()
    return (*broadcast(left[:-2], right[:-2]), *left[-2:-1], *columns)


def gemm(call: Call, a: Value, b: Value, c: Operand = None) -> Shape:
    fits = len(a.shape) == len(b.shape) == 2 and a.dtype == b.dtype
    need(fits, "expected two matrices of one type")
    left = a.shape[::-1] if call.number("transA") else a.shape
    right = b.shape[::-1] if call.number("transB") else b.shape
    _check_equal("inner sizes", left[1], right[0])
    product = (left[0], right[1])
    need(c is None or len(broadcast(product, c.shape)) == 2, f"bias: expected one for {product}")
    return product


def einsum(call: Call, *values: Value) -> Shape:
    equation = call.text("equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    parts, letters = terms.split(","), terms.replace(",", "") + result
    fits = len(parts) == len(values) and arrow and letters.isascii() and letters.isalpha()
    need(fits, "equation: expected terms of letters and a result")
    sizes: dict[str, Dim] = {}
    for value, term in zip(values, parts, strict=True):
        fits = len(value.shape) == len(term) == len(set(term))
        need(fits, f"equation: expected {len(value.shape)} letters, each once, not {term!r}")
        for letter, size in zip(term, value.shape, strict=True):
            _check_equal(f"sizes of {letter}", sizes.setdefault(letter, size), size)
            sizes[letter] = _one(sizes[letter], size)
    fits = len(set(result)) == len(result) and set(result) <= set(sizes)
    need(fits, "equation: expected letters of the terms in the result")
    return tuple(sizes[letter] for letter in result)


def conv(call: Call, x: Value, weight: Value, bias: Operand = None) -> Shape:
    rank, groups = len(_image(x)) - 2, call.number("group", 1)
    fits = len(weight.shape) == rank + 2 and fixed(*weight.shape)
    need(fits, "expected weights for the image's axes")
    transposed, (first, second, *kernel) = call.kind == "ConvTranspose", weight.shape
    inside, outside = (first, second * groups) if transposed else (second * groups, first)
    fits = x.shape[1] == inside and outside % groups == inside % groups == 0
    need(fits and x.dtype == weight.dtype, "expected channels that fit")
    need(bias is None or bias.shape == (outside,), f"bias: expected {outside} numbers")
    need(call.attributes.get("kernel_shape", kernel) == kernel, f"kernel_shape: expected {kernel}")
    return (x.shape[0], outside, *_counts(call, x.shape[2:], kernel))


def _steps(call: Call, name: str, count: int, default: int, fewest: int = 1) -> list[int]:
    """One or more numbers for each axis of an image."""
    steps: list[int] = call.attributes.get(name, [default] * count)
    fits = len(steps) == count and min(steps) >= fewest
    need(fits, f"{name}: expected {count} of {fewest} or more")
    return steps


def _counts(call: Call, sizes: Shape, kernel: list[int]) -> list[int]:
    """How often a window fits along each axis; of ConvTranspose the sides that windows cover."""
    rank, transposed = len(sizes), call.kind == "ConvTranspose"
    stated = call.text("auto_pad", "NOTSET") == "NOTSET"
    for name in ("strides", "dilations"):
        _steps(call, name, rank, 1)
    pads, more = _steps(call, "pads", 2 * rank, 0, 0), _steps(call, "output_padding", rank, 0, 0)
    need(stated or not transposed, "auto_pad: expected NOTSET")
    need(fixed(*sizes) and min(kernel) >= 1, "expected an image and a kernel of known size")
    lie, counts = runs.windows(sizes, kernel, call.attributes), list[int]()
    for axis, (size, step, span) in enumerate(zip(sizes, lie.strides, lie.reach, strict=True)):
        before, after = pads[axis], pads[rank + axis]
        if transposed:
            counts.append((size - 1) * step + more[axis] + span - before - after)
            fits = counts[-1] >= 1 and more[axis] < max(step, lie.dilations[axis])
            need(fits, "pads: expected an image to be left")
            continue
        most = size + before + after if stated else size + sum(lie.around[axis])
        need(most >= span, f"kernel: expected at most {most} pixels")
        fits = "Pool" not in call.kind or max(before, after) < span
        need(fits, f"pads: expected less than the kernel's {span} pixels")
        counts.append((size + sum(lie.around[axis]) - span) // step + 1)
    return counts


def pool(call: Call, x: Value) -> Shape:
    rank = len(_image(x)) - 2
    if call.kind.startswith("Global"):
        return (*x.shape[:2], *[1] * rank)
    return (*x.shape[:2], *_counts(call, x.shape[2:], _steps(call, "kernel_shape", rank, 0)))


def layer_norm(call: Call, x: Value, *operands: Operand) -> Shape:
    inner = x.shape[call.axis(len(x.shape), -1) :]
    fits = all(each is None or broadcast(inner, each.shape) == inner for each in operands)
    need(fits, f"expected scale and bias for {list(inner)}")
    return x.shape


def channel_norm(call: Call, x: Value, *operands: Value) -> Shape:
    """BatchNormalization, InstanceNormalization and GroupNormalization."""
    channels: Dim = x.shape[1] if len(x.shape) > 1 else None
    groups = call.number("num_groups", 1)
    fits = fixed(channels) and all(each.shape == (channels,) for each in operands)
    need(fits, f"expected numbers for each of {channels} channels")
    fits = groups >= 1 and channels % groups == 0
    need(fits, f"num_groups: expected one that divides {channels}")
    need(call.kind[0] == "B" or len(x.shape) >= 3, "expected an image")
    need(not call.number("training_mode"), "training_mode: expected 0")
    return x.shape


def resize(
    call: Call, x: Value, roi: Operand = None, scales: Operand = None, sizes: Operand = None
) -> Shape:
    shape = list(_image(x))
    axes = call.axes(None, len(shape)) or list(range(len(shape)))
    used = [each for each in (scales, sizes) if each is not None and each.shape != (0,)]
    need(len(used) == 1, "expected either scales or sizes")
    if used[0] is sizes:
        new = sizes_of(used[0], 1)
    else:
        factors = [float(number) for number in used[0].numbers().reshape(-1)]
        fits = len(factors) == len(axes) and all(0 < f <= _MOST_SCALE for f in factors)
        need(fits, f"scales: expected {len(axes)} numbers up to {_MOST_SCALE}")
        pairs = zip([shape[axis] for axis in axes], factors, strict=True)
        new = tuple(math.floor(size * f) if fixed(size) else None for size, f in pairs)
    fits = len(new) == len(axes) and all(not fixed(size) or size >= 1 for size in new)
    need(fits, f"expected {len(axes)} sizes of 1 or more")
    for axis, size in zip(axes, new, strict=True):
        shape[axis] = size
    return tuple(shape)


def quantise(call: Call, x: Value, scale: Value, zero: Operand = None) -> Value:
    backwards = call.kind == "DequantizeLinear"
    zeros = zero.dtype if zero else DTYPES.get(call.number("output_dtype", 2), "")
    stored = x.dtype if backwards else zeros
    fits = stored in ("uint8", "int8", "float8_e4m3fn") or (backwards and stored == "int32")
    need(fits and scale.dtype in ("float32", "float16"), "expected 8 bits and a float scale")
    fits = zero is None or (zero.shape == scale.shape and zero.dtype == stored)
    need(fits, "zero_point: expected the scale's shape and the stored type")
    need(not call.number("block_size"), "block_size: expected 0")
    if scale.shape:
        size = x.shape[call.axis(len(x.shape), 1)] if x.shape else None
        fits = fixed(size) and scale.shape in ((size,), (1,))
        need(fits, f"scale: expected one or {size} numbers")
    return Value(scale.dtype if backwards else stored, x.shape)


def attention(call: Call, q: Value, k: Value, v: Value, mask: Operand = None) -> Shape:
    fits = all(len(each.shape) == 4 and fixed(*each.shape) for each in (q, k, v))
    need(fits and q.dtype == k.dtype, "expected [B, H, N, D] of known sizes and one type")
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    need(fits and k.shape[2] == v.shape[2], "expected shapes that fit")
    scores = (*q.shape[:3], k.shape[2])
    fits = mask is None or broadcast(scores, mask.shape) == scores
    need(fits, f"attn_mask: expected one for {list(scores)}")
    return (*q.shape[:3], v.shape[3])
