"""What a rewritten graph holds besides ONNX's operators; these names are none of ONNX's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.backends._torch_graph import attention
from zsseg_rt.backends._torch_graph.arrays import add_norm_rows
from zsseg_rt.backends._torch_graph.operators import (
    OPERATORS,
    Attributes,
    Operator,
    elementwise,
)


def _unit(attributes: Attributes, x: Tensor, ones: Tensor) -> Tensor:
    """Rows of unit norm: torch's kernel for normalised weights, each of length 1."""
    given = x.reshape(len(ones), -1).contiguous()  # the kernel does not look at strides
    rows, _ = torch._weight_norm_interface(given, ones, 0)
    return rows.view(x.shape)


def _ones(attributes: Attributes, x: Tensor, one: Tensor) -> Tensor:
    return one.repeat(x.shape[:-1].numel(), 1)


def _patches(attributes: Attributes, x: Tensor) -> Tensor:
    """Rows [B, N, C * h * w] of what an image [B, C, H, W] has in each patch, row by row."""
    height, width = attributes["hw"]
    patches = x.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
    return patches.reshape(len(x), -1, x.shape[1] * height * width)


def _fused_attention(
    attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    scale = attributes["scale"]
    is_one = q.ndim == k.ndim == v.ndim == 3
    if is_one:  # torch has fused kernels for [B, H, N, D] alone
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    if q.is_cuda and "taken" not in attributes:  # the same in every run
        attributes["taken"] = attention.kind_taken(q, k, v, mask)
    attended = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return attended.squeeze(0) if is_one else attended


def _linear(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.addmm(bias, rows, weight).view(*x.shape[:-1], weight.shape[1])


def _linear_relu(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight)
    return rows.view(*x.shape[:-1], weight.shape[1])


def _extended_rows(attributes: Attributes, x: Tensor, *weights: Tensor) -> Tensor:
    """What ``ExtendedLinear`` writes into: rows of ``x`` [1, N, W] to come, then those given."""
    below = weights[-1]
    return torch.cat([below.new_empty(x.shape[1], below.shape[1]), below])


def _extended_linear(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor
) -> Tensor:
    torch.addmm(bias, x[0], weight, out=rows[: x.shape[1]])
    return rows[None]


def _wider_rows(x: Tensor) -> Tensor:
    """Contiguous rows that begin with those of ``x``: what ``x`` is cut from, where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    width, step = rows.stride()
    end = rows.storage_offset() + len(rows) * width
    if step != 1 or width < rows.shape[1] or end * rows.itemsize > rows.untyped_storage().nbytes():
        return rows.contiguous()
    return rows.as_strided((len(rows), width), (width, 1))


def _add_norm(
    attributes: Attributes, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor
) -> Sequence[Tensor]:
    """The normalised sum, and the sum where something else reads it."""
    with_total = attributes["with_total"]
    if x.shape != y.shape or x.dtype != y.dtype:
        total = x + y
        normed, weights = total.float(), zip(attributes["eps"], scale, shift, strict=True)
        for eps, weight, bias in weights:
            normed = F.layer_norm(normed, weight.shape, weight, bias, eps)
        normed = normed.to(total.dtype)
        return (normed, total) if with_total else (normed,)
    left, right = _wider_rows(x), y.reshape(-1, x.shape[-1]).contiguous()
    written = [torch.empty_like(right) for _ in range(1 + with_total)]
    given = left, right, scale, shift, attributes["eps"], written[0]
    add_norm_rows(*given, written[1] if with_total else None)
    return [rows.view(x.shape) for rows in written]


def _start_rows(attributes: Attributes, x: Tensor, *constants: Tensor) -> Tensor:
    """What ``StartRows`` writes into: rows of ``x`` [1, N, D] to come, between constant ones."""
    around, before = constants[-1], attributes["before"]
    return torch.cat(
        [around[:, :before], around.new_empty(2, *x.shape[1:]), around[:, before:]], dim=1
    )


def _start(
    attributes: Attributes,
    x: Tensor,
    positions: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor,
) -> Sequence[Tensor]:
    """All rows after the last norm, and before it."""
    begin = attributes["before"]
    total, normed = rows[:, begin : begin + x.shape[1]]
    left, right = x[0].contiguous(), positions.expand_as(x)[0].contiguous()
    eps = attributes["eps"]
    add_norm_rows(left, right, scale, shift, eps, normed, total, len(eps) - 1)
    return rows[1:], rows[:1]


def _parts(attributes: Attributes, x: Tensor) -> Sequence[Tensor]:
    return torch.split(x, attributes["sizes"], dim=attributes["axis"])


_FUSED: dict[str, Operator] = {
    "AddNorm": _add_norm,
    "DropRows": lambda attributes, x: x[:, : -attributes["rows"]],
    "ExtendedLinear": _extended_linear,
    "FusedAttention": _fused_attention,
    "Linear": _linear,
    "LinearRelu": _linear_relu,
    "Parts": _parts,
    "Patches": _patches,
    "Silu": elementwise(F.silu),
    "StartRows": _start,
    "SwapLastAxes": elementwise(lambda x: x.transpose(-1, -2)),
    "Unit": _unit,
}

RUNNABLE = OPERATORS | _FUSED

KEEPERS: dict[str, Callable[..., Tensor]] = {
    "ExtendedLinear": _extended_rows,
    "StartRows": _start_rows,
    "Unit": _ones,
}
"""Make memory that runs share, from a node's inputs; it takes the place of the last of these."""
