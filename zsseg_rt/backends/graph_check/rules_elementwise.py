"""Operators that compute each element by itself, and reductions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np

from zsseg_rt.backends.graph_check.value import (
    INT32,
    INT64,
    LARGEST,
    Call,
    Dim,
    Known,
    Shape,
    Value,
    full,
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
    return Value(value.dtype, value.shape, known=_sized([value], value.shape))


def _sized(values: list[Value], shape: Shape) -> Known | None:
    """Numbers that follow from sizes, but are not worked out here."""
    return full(shape, None) if all(value.is_sized() for value in values) else None


def _negative(call: Call) -> Value:
    value, known = call.value(0), call.value(0).known()
    return Value(value.dtype, value.shape, known=None if known is None else _each(_minus, known))


def _cast(call: Call) -> Value:
    value, dtype = call.value(0), call.number("to", 0)
    if dtype not in (*_INTEGERS, *_FLOATS, BOOL):
        raise ValueError(f"to: expected a type of numbers, got {dtype}")
    if value.dtype not in (INT32, INT64, BOOL) or dtype not in (INT32, INT64):
        return Value(dtype, value.shape, known=_sized([value], value.shape))
    return Value(
        dtype, value.shape, known=value.known(), bounds=value.bounds(), source=value.source
    )


def _cast_like(call: Call) -> Value:
    return Value(call.value(1).dtype, call.value(0).shape)


def _each(function: Callable[..., Any], *arrays: Known) -> Known:
    """Apply a function of integers; what is not known, or has over 32 bits, becomes unknown."""

    def known(*numbers: Any) -> Any:
        if any(number is None or abs(number) >= LARGEST for number in numbers):
            return None
        return function(*numbers)

    return np.asarray(np.frompyfunc(known, len(arrays), 1)(*arrays), object)


def _minus(number: int) -> int:
    return -number


def _divided(a: int, b: int) -> int:
    return abs(a) // b * (-1 if a < 0 else 1)  # towards zero


def _power(a: int, b: int) -> int | None:
    return a**b if 0 <= b <= 4 and abs(a) <= 1 << 16 else None


_ON_INTEGERS: dict[str, Callable[[int, int], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divided,
    "Mod": lambda a, b: a % b,
    "Max": max,
    "Min": min,
    "Pow": _power,
    "Equal": lambda a, b: int(a == b),
}
_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_MONOTONE = ("Add", "Sub", "Mul", "Max", "Min")


def _combine(call: Call) -> Value:
    values = [call.value(index) for index in range(len(call.inputs))]
    dtypes = {value.dtype for value in values}
    if len(dtypes) > 1 and call.op_type != "Pow":
        raise ValueError(f"expected inputs of one type, got data types {sorted(dtypes)}")
    shape = broadcast([value.shape for value in values])
    dtype = BOOL if call.op_type in _COMPARE else values[0].dtype
    if call.op_type == "PRelu" and shape != values[0].shape and None not in shape:
        raise ValueError(f"slope: expected one that fits {list(values[0].shape)}, got {shape}")
    if values[0].dtype not in _INTEGERS:
        return Value(dtype, shape, known=_sized(values, shape))
    if call.op_type in ("Div", "Mod"):
        return _quotient(call, values, shape)
    bounds = None
    if call.op_type in _MONOTONE and len(values) == 2:
        bounds = _interval(call.op_type, values[0].bounds(), values[1].bounds())
    return Value(dtype, shape, known=_known(call, values), bounds=bounds)


def _known(call: Call, values: list[Value]) -> Known | None:
    function = _ON_INTEGERS.get(call.op_type)
    parts = [value.known() for value in values]
    if function is None or len(parts) != 2 or parts[0] is None or parts[1] is None:
        return _sized(values, broadcast([value.shape for value in values]))
    return _each(function, parts[0], parts[1])


def _interval(
    op_type: str, a: tuple[int, int] | None, b: tuple[int, int] | None
) -> tuple[int, int] | None:
    if a is None or b is None:
        return None
    ends = [_ON_INTEGERS[op_type](x, y) for x in a for y in b]
    return min(ends), max(ends)


def _quotient(call: Call, values: list[Value], shape: Shape) -> Value:
    """Integers divided by zero, or the lowest by -1, end the process."""
    bounds = values[1].bounds()
    if bounds is None or bounds[0] < 1:
        raise ValueError(f"divisor: expected constants of 1 or more, got {_told(bounds)}")
    limits = (0, bounds[1] - 1) if call.op_type == "Mod" else None
    if call.number("fmod", 0):
        raise ValueError("fmod: expected 0 for integers, got 1")
    return Value(values[0].dtype, shape, known=_known(call, values), bounds=limits)


def _told(bounds: tuple[int, int] | None) -> str:
    return "values of the graph" if bounds is None else f"{bounds[0]} to {bounds[1]}"


def _where(call: Call) -> Value:
    condition, yes, no = (call.value(index) for index in range(3))
    if condition.dtype != BOOL or yes.dtype != no.dtype:
        raise ValueError(
            f"expected a condition and two inputs of one type, got data types {condition.dtype}, "
            f"{yes.dtype} and {no.dtype}"
        )
    shape = broadcast([condition.shape, yes.shape, no.shape])
    parts = [value.known() for value in (condition, yes, no)]
    known = None
    if all(part is not None for part in parts):
        known = _each(lambda c, a, b: a if c else b, *(p for p in parts if p is not None))
    a, b = yes.bounds(), no.bounds()
    bounds = (min(a[0], b[0]), max(a[1], b[1])) if a and b else None
    return Value(yes.dtype, shape, known=known, bounds=bounds)


def _clip(call: Call) -> Value:
    value, limits = call.value(0), []
    for index in (1, 2):
        limit = call.given(index)
        if limit is not None and (limit.dtype != value.dtype or limit.size != 1):
            raise ValueError(f"input {index}: expected one number of the input's type")
        limits.append(None if limit is None else limit.bounds())
    low, high = limits
    bounds = (low[0], max(low[0], high[1])) if low and high else value.bounds()
    return Value(value.dtype, value.shape, bounds=bounds)


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
    known, numbers = _sized([value], shape), value.known()
    if call.op_type == "ReduceProd" and known is not None and numbers is not None:
        whole = None not in numbers.reshape(-1) and not shape
        known = full(shape, int(np.prod(numbers)) if whole else None)
    return Value(value.dtype, shape, known=known)


def _pick(call: Call) -> Value:
    """ArgMax and ArgMin: places along an axis."""
    shape = list(call.value(0).shape)
    axis = call.axis(len(shape))
    size = shape[axis]
    bounds = (0, size - 1) if size else None
    shape[axis : axis + 1] = [1] if call.number("keepdims", 1) else []
    return Value(INT64, tuple(shape), bounds=bounds)


RULES: dict[str, Callable[[Call], Value | list[Value]]] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_COMBINE.split(), _combine),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    "ArgMax": _pick,
    "ArgMin": _pick,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "CumSum": _cumsum,
    "Dropout": _dropout,
    "Neg": _negative,
    "Where": _where,
}
