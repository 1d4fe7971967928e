"""Operators of networks: products, convolutions, pools, norms, resizing, quantisation."""

from __future__ import annotations

import math
from collections.abc import Callable

from zsseg_rt.backends.graph_check.rules import broadcast
from zsseg_rt.backends.graph_check.value import Call, Dim, Shape, Value

_MOST_SCALE = 1 << 16


def _matmul(call: Call) -> Value:
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


def _gemm(call: Call) -> Value:
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


def _einsum(call: Call) -> Value:
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


def _conv(call: Call) -> Value:
    data, weight, bias = call.value(0), call.value(1), call.given(2)
    rank, groups = len(data.shape) - 2, call.number("group", 1)
    if not 1 <= rank <= 3 or len(weight.shape) != rank + 2 or None in weight.shape:
        raise ValueError(
            f"expected an image and as many weights, got {list(data.shape)}, {list(weight.shape)}"
        )
    flipped = call.op_type == "ConvTranspose"
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
        if "Pool" in call.op_type and max(pads[axis], pads[axis + rank]) >= reach:
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


def _pool(call: Call) -> Value:
    data = call.value(0)
    rank = len(data.shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"expected an image, got shape {list(data.shape)}")
    kernel = _steps(call, "kernel_shape", rank, 0)
    return Value(data.dtype, (*data.shape[:2], *_windows(call, data.shape[2:], kernel)))


def _global_pool(call: Call) -> Value:
    data = call.value(0)
    if not 3 <= len(data.shape) <= 5:
        raise ValueError(f"expected an image, got shape {list(data.shape)}")
    return Value(data.dtype, (*data.shape[:2], *[1] * (len(data.shape) - 2)))


def _layer_norm(call: Call) -> Value:
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


def _channel_norm(call: Call) -> Value:
    """BatchNormalization, InstanceNormalization and GroupNormalization."""
    data = call.value(0)
    channels = data.shape[1] if len(data.shape) > 1 else None
    given = [call.value(index).shape for index in range(1, len(call.inputs))]
    groups = call.number("num_groups", 1)
    if channels is None or any(shape != (channels,) for shape in given) or groups < 1:
        raise ValueError(f"expected numbers for each of {channels} channels, got {given}")
    if channels % groups or (call.op_type[0] != "B" and len(data.shape) < 3):
        raise ValueError(f"num_groups: expected one that divides {channels}, got {groups}")
    if call.number("training_mode", 0):
        raise ValueError("training_mode: expected 0, got 1")
    return Value(data.dtype, data.shape)


def _lrn(call: Call) -> Value:
    data = call.value(0)
    if len(data.shape) < 3 or not 1 <= call.number("size", 0) <= _MOST_SCALE:
        raise ValueError(f"size: expected 1 or more, for an image, got {call.number('size', 0)}")
    return Value(data.dtype, data.shape)


def _resize(call: Call) -> Value:
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


def _quantise(call: Call) -> Value:
    data, scale, zero = call.value(0), call.value(1), call.given(2)
    backwards = call.op_type == "DequantizeLinear"
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


def _attention(call: Call) -> Value:
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


RULES: dict[str, Callable[[Call], Value | list[Value]]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _channel_norm,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "DequantizeLinear": _quantise,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GroupNormalization": _channel_norm,
    "InstanceNormalization": _channel_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "QuantizeLinear": _quantise,
    "RMSNormalization": _layer_norm,
    "Resize": _resize,
}
