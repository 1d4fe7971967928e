"""ONNX operators in torch: those that this package's exporter and plain CNN encoders use.

Each takes the node's attributes and its inputs and returns its outputs. LayerNorm, softmax and
norms compute in float32 whatever they are given. None waits for a GPU or copies to one what the
graph holds: sizes and indices are host numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.backends._torch_graph.resize import resize

Attributes = dict[str, Any]
Operator = Callable[..., "Tensor | Sequence[Tensor]"]

TORCH_DTYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    16: torch.bfloat16,
}


def axes_of(given: Tensor | None) -> list[int]:
    return [] if given is None else given.tolist()


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _layer_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) % x.ndim :]
    eps = attributes.get("epsilon", 1e-5)
    return _normed(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), x, scale, bias)


def _instance_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, eps = x.shape[1], attributes.get("epsilon", 1e-5)
    return _normed(lambda x, w, b: F.group_norm(x, groups, w, b, eps), x, scale, bias)


def _normed(norm: Callable[..., Tensor], x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's norms compute in float32 inside; where the types differ, they are given float32."""
    if x.dtype == scale.dtype and (bias is None or bias.dtype == x.dtype):
        return norm(x, scale, bias)
    return norm(x.float(), scale.float(), None if bias is None else bias.float()).to(x.dtype)


def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return x.softmax(attributes.get("axis", -1))  # in float32 inside, also for half precisions


def _reduce_l2(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(axes) or attributes.get("axes") or list(range(x.ndim))
    keep = bool(attributes.get("keepdims", 1))
    norm: Tensor = torch.linalg.vector_norm(x.float(), dim=dims, keepdim=keep)
    return norm.to(x.dtype)


def _reduce_mean(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(axes) or attributes.get("axes") or list(range(x.ndim))
    keep = bool(attributes.get("keepdims", 1))
    return x.mean(dim=dims, keepdim=keep)


def _reduce_sum(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(axes) or list(range(x.ndim))
    return x.sum(dim=dims, keepdim=bool(attributes.get("keepdims", 1)))


def _slice(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    count = len(starts)
    bounds = zip(
        starts.tolist(),
        ends.tolist(),
        axes_of(axes) or range(count),
        axes_of(steps) or [1] * count,
        strict=True,
    )
    for start, end, axis, step in bounds:
        x = _take(x, axis % x.ndim, range(*slice(start, end, step).indices(x.shape[axis])))
    return x


def _take(x: Tensor, axis: int, span: range) -> Tensor:
    """Indices of an axis that are evenly spaced: a view, where they ascend."""
    ascending = span if span.step > 0 else span[::-1]
    picked = x[(slice(None),) * axis + (slice(ascending.start, ascending.stop, ascending.step),)]
    return picked if span.step > 0 else picked.flip(axis)


def _split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, sizes.tolist(), dim=axis)
    parts = attributes["num_outputs"]
    return torch.split(x, -(-x.shape[axis] // parts), dim=axis)


def _gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.ndim
    size = x.shape[axis]
    if indices.device.type == "cpu":
        found = [index + size if index < 0 else index for index in indices.reshape(-1).tolist()]
        if any(not 0 <= index < size for index in found):
            raise IndexError(f"expected indices from {-size} to {size - 1}, got {indices.tolist()}")
        if indices.ndim == 0:
            return x.select(axis, found[0])
        if is_run(indices):
            return _take(x, axis, range(found[0], found[0] + len(found)))
    wrapped = torch.remainder(indices, size).long().to(x.device)
    picked = x.index_select(axis, wrapped.reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def is_run(indices: Tensor) -> bool:
    """Whether host indices [N] count up by one, so that what they pick is a view."""
    if indices.device.type != "cpu" or indices.ndim != 1 or not indices.numel():
        return False
    first = int(indices[0])
    # From below zero to above, they name places that are not neighbours.
    is_wrapping = first < 0 <= first + indices.numel() - 1
    return not is_wrapping and indices.tolist() == list(range(first, first + indices.numel()))


def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    dims = axes.reshape(-1).tolist()
    rank = x.ndim + len(dims)
    for axis in sorted(axis % rank for axis in dims):
        x = x.unsqueeze(axis)
    return x


def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.reshape(-1).tolist()))


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, padding = _pad(attributes, x, 0.0, weight.shape[2:])
    return torch.conv2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", [1, 1]),
        padding=padding,
        dilation=attributes.get("dilations", [1, 1]),
        groups=attributes.get("group", 1),
    )


def _conv_transpose(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    automatic = attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in attributes
    if automatic or pads[:2] != pads[2:]:
        raise ValueError("expected the same padding at both ends, stated as pads")
    return torch.conv_transpose2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", [1, 1]),
        padding=pads[:2],
        output_padding=attributes.get("output_padding", [0, 0]),
        groups=attributes.get("group", 1),
        dilation=attributes.get("dilations", [1, 1]),
    )


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    product: Tensor = torch.mm(a, b) * attributes.get("alpha", 1.0)
    return product if c is None else product + c * attributes.get("beta", 1.0)


def _elu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, attributes.get("alpha", 1.0))


def _pad(
    attributes: Attributes, x: Tensor, value: float, kernel_hw: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Pad unevenly here; an even padding is left to the operator. ``auto_pad`` is resolved."""
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_pads(attributes, x.shape[2:], kernel_hw, upper=mode == "SAME_UPPER")
    if pads[:2] == pads[2:]:
        return x, pads[:2]
    return F.pad(x, [pads[1], pads[3], pads[0], pads[2]], value=value), [0, 0]


def _same_pads(
    attributes: Attributes, size_hw: Sequence[int], kernel_hw: Sequence[int], *, upper: bool
) -> list[int]:
    strides = attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    before, after = [], []
    for size, kernel, stride, dilation in zip(size_hw, kernel_hw, strides, dilations, strict=True):
        reach = (kernel - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if upper else large)
        after.append(large if upper else small)
    return before + after


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    include = bool(attributes.get("count_include_pad", 0))
    padded, padding = _pad(attributes, x, 0.0, kernel)
    settings = {
        "stride": attributes.get("strides", [1, 1]),
        "padding": padding,
        "ceil_mode": bool(attributes.get("ceil_mode", 0)),
        "count_include_pad": include,
    }
    pooled = F.avg_pool2d(padded, kernel, **settings)
    if include or padded is x:
        return pooled
    inside, _ = _pad(attributes, torch.ones_like(x[:1, :1]), 0.0, kernel)
    return pooled / F.avg_pool2d(inside, kernel, **settings)


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    x, padding = _pad(attributes, x, -math.inf, kernel)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):  # torch refuses
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], value=-math.inf)
        padding = [0, 0]
    return F.max_pool2d(
        x,
        kernel,
        stride=attributes.get("strides", [1, 1]),
        padding=padding,
        dilation=attributes.get("dilations", [1, 1]),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def _clip(
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    # Bounds that the graph holds are attributes, as they were before operator set 11.
    lowest, highest = attributes.get("min", low), attributes.get("max", high)
    return x if lowest is None and highest is None else x.clamp(lowest, highest)


def _expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes: list[int] = shape.tolist()
    rank = max(len(sizes), x.ndim)
    own = [1] * (rank - x.ndim) + list(x.shape)
    asked = [1] * (rank - len(sizes)) + sizes
    return x.expand([a if o == 1 else o for o, a in zip(own, asked, strict=True)])


def _arg_max(attributes: Attributes, x: Tensor) -> Tensor:
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    sizes = list(x.shape)[attributes.get("start", 0) : attributes.get("end", None)]
    return torch.tensor(sizes, dtype=torch.int64)


def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    return x.to(TORCH_DTYPES[attributes["to"]])


def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.get("approximate", b"none").decode())


def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))


def _concat(attributes: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=attributes["axis"])


def elementwise(function: Callable[..., Tensor]) -> Operator:
    return lambda attributes, *inputs: function(*inputs)


OPERATORS: dict[str, Operator] = {
    "Add": elementwise(torch.add),
    "ArgMax": _arg_max,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": elementwise(torch.div),
    "Elu": _elu,
    "Equal": elementwise(torch.eq),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": elementwise(lambda x: x.mean(dim=(2, 3), keepdim=True)),
    "Identity": elementwise(lambda x: x),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": elementwise(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": elementwise(torch.mul),
    "ReduceL2": _reduce_l2,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": elementwise(torch.relu),
    "Reshape": _reshape,
    "Resize": resize,
    "Shape": _shape,
    "Sigmoid": elementwise(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": elementwise(torch.sub),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
