"""The mask decoder: class queries attend to patches, and the attention scores are the masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.transformer import merge_heads, split_heads
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
        projected = (self.q(queries), self.k(memory), self.v(memory))
        q, k, v = (split_heads(part, self.num_heads) for part in projected)
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return self.proj(merge_heads(attended))  # type: ignore[no-any-return]

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


class FoldedDecoder(nn.Module):
    """The mask decoder reduced to what inference needs, up to the last product.

    All projections of the patches are one matrix; the last layer keeps its query and key only.
    ``patch_text_similarity(patch_keys, class_embeds, logit_scale=decoder.logit_scale,
    normalize=False)`` returns the mask logits.
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        layers = decoder.decoder_layers()
        self.layers = nn.ModuleList(_RefiningLayer(layer) for layer in layers[:-1])
        attentions = [layer.multihead_attn for layer in layers]
        memory_projections = [part for a in attentions[:-1] for part in (a.k, a.v)]
        memory_projections.append(attentions[-1].k)
        self.memory_proj = _stack(memory_projections)
        self.query_proj = attentions[-1].q
        self.query_dim = self.query_proj.out_features
        self.logit_scale = attentions[-1].logit_scale
        self.eval()

    def forward(self, queries: Tensor, patch_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Decode class queries.

        Shapes:
            queries: Output of the relationship descriptor, ``[B, C, E]``.
            patch_embeds: ``[B, N, D]``, unit norm.

        Returns:
            ``class_embeds`` ``[B, C, E]`` and ``patch_keys`` ``[B, N, E]``.
        """
        projected = self.memory_proj(patch_embeds).split(self.query_dim, dim=-1)
        for index, layer in enumerate(self.layers):
            queries = layer(queries, projected[2 * index], projected[2 * index + 1])
        return self.query_proj(queries), projected[-1]


class _FoldedLayer(nn.Module):
    """A decoder layer whose queries, keys and values are already projected."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.num_heads = layer.multihead_attn.num_heads
        self.proj = layer.multihead_attn.proj
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm2, self.norm3 = layer.norm2, layer.norm3

    def refine(self, tokens: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.num_heads) for x in (queries, keys, values))
        attended = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        tokens = self.norm2(tokens + attended)
        hidden = F.relu(self.linear1(tokens))
        return self.norm3(tokens + self.linear2(hidden))  # type: ignore[no-any-return]


class _RefiningLayer(_FoldedLayer):
    """A decoder layer whose keys and values are already projected."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__(layer)
        self.q = layer.multihead_attn.q

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.refine(queries, self.q(queries), keys, values)


class _TwoWayLayer(nn.Module):
    """Queries attend to patches while patches attend to queries; one projection per side."""

    def __init__(self, query_layer: DecoderLayer, patch_layer: DecoderLayer) -> None:
        super().__init__()
        to_patches, to_queries = query_layer.multihead_attn, patch_layer.multihead_attn
        self.query_side = _stack([to_patches.q, to_queries.k, to_queries.v])
        self.patch_side = _stack([to_queries.q, to_patches.k, to_patches.v])
        self.query_layer, self.patch_layer = _FoldedLayer(query_layer), _FoldedLayer(patch_layer)

    def forward(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        query_q, query_k, query_v = self.query_side(queries).chunk(3, dim=-1)
        patch_q, patch_k, patch_v = self.patch_side(patches).chunk(3, dim=-1)
        return (
            self.query_layer.refine(queries, query_q, patch_k, patch_v),
            self.patch_layer.refine(patches, patch_q, query_k, query_v),
        )


class FoldedTwoWayDecoder(nn.Module):
    """CLIP-RC's decoder up to the last product, with the mean over cells taken before it.

    The mean over cells commutes with the product of queries and patches, so the product is taken
    with C mean queries, not with R * C. ``patch_text_similarity(patch_keys, class_embeds,
    logit_scale=1, normalize=False)`` returns the mask logits.
    """

    def __init__(self, query_decoder: DecoderStack, patch_decoder: DecoderStack) -> None:
        super().__init__()
        pairs = zip(query_decoder.decoder_layers(), patch_decoder.decoder_layers(), strict=True)
        self.layers = nn.ModuleList(_TwoWayLayer(*pair) for pair in pairs)
        self.eval()

    def forward(self, queries: Tensor, patch_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the class queries of one image.

        Shapes:
            queries: Output of the relationship descriptor, one row per cell, ``[R, C, E]``.
            patch_embeds: Cell-aware patches, ``[1, N, E]``.

        Returns:
            ``class_embeds`` ``[1, C, E]`` and ``patch_keys`` ``[1, N, E]``.
        """
        num_cells, _, query_dim = queries.shape
        flat = queries.reshape(1, -1, query_dim)
        for layer in self.layers:
            flat, patch_embeds = layer(flat, patch_embeds)
        decoded = flat.reshape(num_cells, -1, query_dim)
        return decoded.mean(dim=0, keepdim=True), patch_embeds


def _stack(projections: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that returns the outputs of several, concatenated."""
    weight = torch.cat([part.weight.detach() for part in projections])
    bias = torch.cat([part.bias.detach() for part in projections])
    stacked = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    stacked.bias = nn.Parameter(bias, requires_grad=False)
    return stacked
