"""The mask decoder: class queries attend to patches, and the attention scores are the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.transformer import attend
from zsseg_rt.models.functional import patch_text_similarity


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the mask decoder; the defaults are official.

    Attributes:
        query_dim: Width E of class queries.
        num_layers: Decoder layers.
        num_heads: Heads of the cross attention.
        ffn_dim: Hidden width of the feed-forward networks.
        dropout: Dropout on the attention's weights, after the attention, and inside and after the
            feed-forward network, in training.
    """

    query_dim: int = 512
    num_layers: int = 3
    num_heads: int = 8
    ffn_dim: int = 2048
    dropout: float = 0.1


class CrossAttention(nn.Module):
    """Queries attend to patches; the scaled scores themselves are the masks."""

    def __init__(
        self, query_dim: int, memory_dim: int, num_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(query_dim, query_dim)
        self.k = nn.Linear(memory_dim, query_dim)
        self.v = nn.Linear(memory_dim, query_dim)
        self.proj = nn.Linear(query_dim, query_dim)

    @property
    def logit_scale(self) -> float:
        """Turns a full dot product into the mean over heads of the scaled dot products."""
        head_dim = self.q.out_features // self.num_heads
        return 1.0 / (self.num_heads * math.sqrt(head_dim))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from ``queries`` ``[B, C, E]`` to ``memory`` ``[B, N, D]``; ``[B, C, E]``."""
        q, k, v, rate = self.q(queries), self.k(memory), self.v(memory), self.dropout
        attended = attend(q, k, v, self.num_heads, dropout=rate if self.training else 0.0)
        return self.proj(attended)  # type: ignore[no-any-return]

    def mask_logits(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Scaled scores before the softmax, averaged over heads, ``[B, C, N]``."""
        return patch_text_similarity(
            self.k(memory), self.q(queries), logit_scale=self.logit_scale, normalize=False
        )


class DecoderLayer(nn.Module):
    """Cross attention and a feed-forward network, each followed by its norm."""

    def __init__(self, config: DecoderConfig, memory_dim: int) -> None:
        super().__init__()
        dim = config.query_dim
        self.dropout = config.dropout
        self.multihead_attn = CrossAttention(dim, memory_dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Refine ``queries`` ``[B, C, E]`` by ``memory`` ``[B, N, D]``."""
        attended = self.multihead_attn(queries, memory)
        queries = self.norm2(queries + self._drop(attended))
        hidden = self._drop(F.relu(self.linear1(queries)))
        return self.norm3(queries + self._drop(self.linear2(hidden)))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DecoderStack(nn.Module):
    """Several layers, named ``layers`` as in official checkpoints."""

    def __init__(self, config: DecoderConfig, memory_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config, memory_dim) for _ in range(config.num_layers)
        )

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @torch.no_grad()
    def copy_first_layer(self) -> None:
        """Start all layers with the first one's weights, as officially."""
        first, *others = self.decoder_layers()
        for layer in others:
            layer.load_state_dict(first.state_dict())


class MaskDecoder(DecoderStack):
    """The layers; the masks are the last layer's attention scores.

    The last layer's value, output projection, norms and feed-forward network belong to official
    checkpoints but are never run.
    """

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Mask logits ``[B, C, N]`` of ``queries`` ``[B, C, E]`` over ``memory`` ``[B, N, D]``."""
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        last = self.layers[-1].multihead_attn
        assert isinstance(last, CrossAttention)
        return last.mask_logits(queries, memory)
