"""The residual blocks of CLIP's two towers.

Module and parameter names are those of the published checkpoints, so loading is direct.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.torch_files.clip_weights import Activation


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``softmax(q k^T / sqrt(w) + mask) v`` in each of the heads, which are w channels wide.

    Shapes:
        queries: ``[..., N, W]``.
        keys: ``[..., M, W]``; so are the values.
        mask: ``[N, M]`` or more, with an axis for heads.

    Returns:
        ``[..., N, W]``.
    """
    q, k, v = (split_heads(part, num_heads) for part in (queries, keys, values))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return merge_heads(attended)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Reshape ``[..., N, W]`` to ``[..., num_heads, N, W / num_heads]``."""
    return torch.unflatten(tokens, -1, (num_heads, -1)).transpose(-2, -3)


def merge_heads(tokens: Tensor) -> Tensor:
    """Reshape ``[..., num_heads, N, W / num_heads]`` to ``[..., N, W]``."""
    return tokens.transpose(-2, -3).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection (rows q, k, v)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``[B, N, W]``; a mask ``[N, N]`` or more is added to the scores."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.num_heads, mask=mask))  # type: ignore[no-any-return]

    def project(self, x: Tensor, reads: str = "qkv") -> dict[str, Tensor]:
        """Queries, keys and values by letter, those that are read, ``[B, heads, N, W / heads]``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return {
            name: split_heads(F.linear(x, weight, bias), self.num_heads)
            for name, weight, bias in zip("qkv", weights, biases, strict=True)
            if name in reads
        }

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights within ``x`` ``[B, N, W]``, ``[B, heads, N, N]``."""
        q, k = self.project(x, "qk").values()
        scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """``c_proj(activation(c_fc(x)))``."""

    def __init__(self, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, hidden_width)
        self.c_proj = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, W]`` to ``[B, N, W]``."""
        hidden = self.c_fc(x)
        if self.activation == "quick_gelu":
            hidden = hidden * torch.sigmoid(1.702 * hidden)
        else:
            hidden = F.relu(hidden) if self.activation == "relu" else F.gelu(hidden)
        return self.c_proj(hidden)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Pre-norm block: ``x += attn(ln_1(x)); x += mlp(ln_2(x))``."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, activation: Activation = "quick_gelu"
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, activation)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map ``[B, N, W]`` to ``[B, N, W]``."""
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A stack of :class:`ResidualBlock`, named ``resblocks`` as in the checkpoints."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        activation: Activation = "quick_gelu",
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, num_heads, mlp_width, activation) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Run every block on ``x`` ``[B, N, W]``."""
        for block in self.resblocks:
            x = block(x, mask=mask)
        return x
