"""What a rewritten graph holds besides ONNX's operators; these names are none of ONNX's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.backends._torch_graph import attention
from zsseg_rt.backends._torch_graph.arrays import add_norm_rows
from zsseg_rt.backends._torch_graph.operators import (
    OPERATORS,
    Attributes,
    Operator,
    axes_of,
    elementwise,
)


def _unit(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(axes) or attributes.get("axes") or list(range(x.ndim))
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return torch.div(x, norm, out=torch.empty_like(x))  # rounded in the same launch


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


def extended_rows(x: Tensor, below: Tensor) -> Tensor:
    """What ``ExtendedLinear`` writes into: rows of ``x`` [1, N, W] to come, then those given."""
    return torch.cat([below.new_empty(x.shape[1], below.shape[1]), below])


def _extended_linear(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor
) -> Tensor:
    torch.addmm(bias, x[0], weight, out=rows[: x.shape[1]])
    return rows[None]


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
    left, right = (held.reshape(-1, x.shape[-1]).contiguous() for held in (x, y))
    written = [torch.empty_like(left) for _ in range(1 + with_total)]
    add_norm_rows(left, right, scale, shift, attributes["eps"], *written)
    return [rows.view(x.shape) for rows in written]


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
    "Silu": elementwise(F.silu),
    "SwapLastAxes": elementwise(lambda x: x.transpose(-1, -2)),
    "Unit": _unit,
}

RUNNABLE = OPERATORS | _FUSED
