"""ZegCLIP and CLIP-RC split where the runtime's kernels take over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.export.folded.clip import (
    FoldedBlock,
    FoldedImageEncoder,
    linear_from,
)
from zsseg_rt.models.clip.transformer import merge_heads, split_heads
from zsseg_rt.models.descriptor.clip_rc import ClipRC
from zsseg_rt.models.descriptor.clip_rc_encoder import BLOCKED, CellImageEncoder, upsample_cells
from zsseg_rt.models.descriptor.mask_decoder import DecoderLayer, DecoderStack, MaskDecoder
from zsseg_rt.models.descriptor.model import DescriptorModel
from zsseg_rt.models.descriptor.zegclip import ZegCLIP

_OFFSET = 0.25  # small beside normalised values, whose rounding in float16 it must not spoil


@dataclass(frozen=True, kw_only=True)
class InferenceParts:
    """A model split where the runtime's kernels take over; for one image.

    ``patch_embeds, cls_embed = image_encoder(image)``;
    ``queries = relationship_descriptor(cls_embed, text_embeds, descriptor_weight,
    descriptor_bias)``; ``class_embeds, patch_keys = decoder(queries, patch_embeds)``;
    ``mask_logits = patch_text_similarity(patch_keys, class_embeds, logit_scale=logit_scale,
    normalize=False)``; then ``upsample_argmax`` with a sigmoid and the seen classes' bias.

    Attributes:
        image_encoder: ``[1, 3, *size_hw]`` to ``patch_embeds`` ``[1, N, M]`` and ``cls_embed``
            ``[R, D]``: what the decoder attends to, and what classes are related to.
        decoder: ``queries`` ``[R, C, Q]`` and ``patch_embeds`` to ``class_embeds`` ``[1, C, E]``
            and ``patch_keys`` ``[1, N, E]``. Q is E, or with the first layer's query 2E.
        descriptor_weight: ``[Q, 2D]``.
        descriptor_bias: ``[Q]``.
        logit_scale: Factor of the last product.
        grid_hw: Patch grid, rows and columns.
        size_hw: Input size in pixels.
        memory_dim: Width M of ``patch_embeds``.
        num_cells: Rows R of ``cls_embed``; 1 where the whole image is the only cell.
    """

    image_encoder: nn.Module
    decoder: nn.Module
    descriptor_weight: Tensor
    descriptor_bias: Tensor
    logit_scale: float
    grid_hw: tuple[int, int]
    size_hw: tuple[int, int]
    memory_dim: int
    num_cells: int = 1


class FoldedCellEncoder(FoldedImageEncoder):
    """A :class:`CellImageEncoder` and the projection of its patches, for one input size.

    Like :class:`FoldedImageEncoder`. In addition, cell tokens start as constants, the mask is a
    constant that is added to the scores, and ``[cell, class, patch]`` is projected
    part by part: a cell is projected before it is spread over the grid.

    Shapes:
        patch_proj: Linear layer from ``[cell, class, patch]``, each of width D, to E.
    """

    cell_tokens: Tensor
    mask: Tensor
    spread: Tensor

    def __init__(
        self, encoder: CellImageEncoder, patch_proj: nn.Linear, size_hw: tuple[int, int]
    ) -> None:
        super().__init__(encoder, size_hw)
        self.num_cells = encoder.config.num_cells
        with torch.no_grad():
            self._fold_cells(encoder, patch_proj)
        self.eval()

    def _fold_cells(self, encoder: CellImageEncoder, patch_proj: nn.Linear) -> None:
        device = self.positions.device
        tokens = encoder.ln_pre(encoder.region_level_bridge)[None]
        self.register_buffer("cell_tokens", tokens)
        allowed = encoder.attention_allowed(self.grid_hw, 0)
        # The folded prompts are the last keys; cells do not see them.
        sees_prompts = torch.ones(len(allowed), encoder.config.num_prompts, dtype=torch.bool)
        sees_prompts[-self.num_cells :] = False
        allowed = torch.cat([allowed, sees_prompts], dim=1)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, BLOCKED)
        self.register_buffer("mask", mask.to(device))
        spread = upsample_cells(torch.eye(self.num_cells)[None], self.grid_hw)
        self.register_buffer("spread", spread.to(device))
        no_bias = torch.zeros_like(patch_proj.bias)
        cell, cls, patch = patch_proj.weight.chunk(3, dim=1)
        self.cell_proj = linear_from(cell.contiguous(), no_bias)
        self.cls_proj = linear_from(cls.contiguous(), patch_proj.bias)
        self.patch_proj = linear_from(patch.contiguous(), no_bias)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode one image of the fixed size.

        Shapes:
            image: Normalised RGB planes, float ``[1, 3, *size_hw]``.

        Returns:
            ``patch_embeds`` ``[1, N, E]``, the projected cell-aware patches, and ``cls_embed``
            ``[R, D]``, the sum of each cell's and the image's unit-norm embeddings.
        """
        tokens = torch.cat([self.embed_patches(image), self.cell_tokens], dim=1)
        num_keys = tokens.shape[1]
        for block in self.blocks:
            assert isinstance(block, FoldedBlock)
            mask = self.mask if block.prompt_keys.shape[2] else self.mask[:, :num_keys]
            tokens = block(tokens, mask)
        seeing_all = self.project(self.prompt_norm(tokens[:, : -self.num_cells]))
        cells = self.project(tokens[:, -self.num_cells :])
        cls_embed, patches = seeing_all[:, :1], seeing_all[:, 1:]
        spread = self.spread @ self.cell_proj(cells)
        patch_embeds = self.patch_proj(patches) + (spread + self.cls_proj(cls_embed))
        return patch_embeds, (cells + cls_embed)[0]


class FoldedDecoder(nn.Module):
    """The mask decoder reduced to what inference needs, up to the last product.

    All projections of the patches are one matrix. Of several layers, the first one's query comes
    with the queries (see :meth:`with_first_query`), and the last one is its key alone: the query's
    projection, and the norm's scale and bias before it, are folded into that (see
    :func:`_fold_query`). ``patch_text_similarity(patch_keys, class_embeds,
    logit_scale=decoder.logit_scale, normalize=False)`` returns the mask logits.
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        layers = decoder.decoder_layers()
        self.layers = nn.ModuleList(_RefiningLayer(layer) for layer in layers[:-1])
        attentions = [layer.multihead_attn for layer in layers]
        self.first_query = attentions[0].q
        memory_projections = [part for a in attentions[:-1] for part in (a.k, a.v)]
        last = attentions[-1]
        self.query_proj: nn.Module = last.q
        if len(layers) > 1:
            norm, key = _fold_query(layers[-2].norm3, last.q, last.k)
            self.layers[-1].norm3, self.query_proj = norm, nn.Identity()
            memory_projections.append(key)
        else:
            memory_projections.append(last.k)
        self.memory_proj = _stack(memory_projections)
        self.query_dim = last.q.out_features
        self.logit_scale = last.logit_scale
        self.eval()

    def with_first_query(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The descriptor's weight and bias, with those of the first layer's query below them."""
        if not self.layers:
            return weight, bias
        query = self.first_query
        projection = query.weight.detach().double()
        below = projection @ weight.double(), projection @ bias.double() + query.bias.double()
        return torch.cat([weight, below[0].float()]), torch.cat([bias, below[1].detach().float()])

    def forward(self, queries: Tensor, patch_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Decode class queries.

        Shapes:
            queries: Output of the relationship descriptor, ``[B, C, 2 * E]``: class queries, and
                the first layer's projection of them; ``[B, C, E]`` where there is one layer.
            patch_embeds: ``[B, N, D]``, unit norm.

        Returns:
            ``class_embeds`` ``[B, C, E]`` and ``patch_keys`` ``[B, N, E]``.
        """
        projected = self.memory_proj(patch_embeds).split(self.query_dim, dim=-1)
        tokens, *first = torch.split(queries, self.query_dim, dim=-1)
        for index, layer in enumerate(self.layers):
            query = None if index else first[0]
            tokens = layer(tokens, projected[2 * index], projected[2 * index + 1], query)
        return self.query_proj(tokens), projected[-1]


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

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, query: Tensor | None = None
    ) -> Tensor:
        return self.refine(tokens, self.q(tokens) if query is None else query, keys, values)


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


def _fold_query(
    norm: nn.LayerNorm, query: nn.Linear, key: nn.Linear
) -> tuple[nn.LayerNorm, nn.Linear]:
    """A norm and a key whose product is that of ``query(norm(x))`` and ``key(y)``, for every x, y.

    Normalised rows n add up to 0, so with ``m = n + c`` a row of c stands for the constant 1:
    ``sum(m) / (c E) = 1``. With ``w = query.weight.T @ key(y)``, ``query(norm(x)) @ key(y)`` is
    ``n @ (scale * w) + bias @ w + query.bias @ key(y)``, and all three are linear in ``key(y)``.
    """
    ones_by = 1 / (_OFFSET * norm.weight.numel())
    scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
    weight = query.weight.detach().double().T
    matrix = torch.diag(scale) @ weight
    matrix += ones_by * ((shift - _OFFSET * scale) @ weight + query.bias.detach().double())
    plain = nn.LayerNorm(len(scale), norm.eps, device=scale.device)
    with torch.no_grad():
        plain.weight.fill_(1)
        plain.bias.fill_(_OFFSET)
    folded = linear_from(
        (matrix @ key.weight.detach().double()).float(), (matrix @ key.bias.double()).float()
    )
    return plain.requires_grad_(False), folded


def _stack(projections: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that returns the outputs of several, concatenated."""
    weight = torch.cat([part.weight.detach() for part in projections])
    bias = torch.cat([part.bias.detach() for part in projections])
    stacked = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    stacked.bias = nn.Parameter(bias, requires_grad=False)
    return stacked


def fold_descriptor(
    model: DescriptorModel, size_hw: tuple[int, int] | None = None
) -> InferenceParts:
    """Split a model, with constants precomputed.

    Returns:
        The parts, in evaluation mode. They share unchanged weights with the model.
    """
    parts: InferenceParts = _FOLDS[model.architecture](model, size_hw or model.size_hw)
    return parts


def _fold_zegclip(model: ZegCLIP, size_hw: tuple[int, int]) -> InferenceParts:
    image_encoder = FoldedImageEncoder(model.backbone, size_hw)
    head, decoder = model.decode_head, FoldedDecoder(model.decode_head.decoder_1)
    weight, bias = head.descriptor_weight().detach(), head.q_proj.bias.detach()
    weight, bias = decoder.with_first_query(weight, bias)
    return InferenceParts(
        image_encoder=image_encoder,
        decoder=decoder,
        descriptor_weight=weight,
        descriptor_bias=bias,
        logit_scale=decoder.logit_scale,
        grid_hw=image_encoder.grid_hw,
        size_hw=size_hw,
        memory_dim=model.config.image_encoder.embed_dim,
    )


def _fold_clip_rc(model: ClipRC, size_hw: tuple[int, int]) -> InferenceParts:
    head = model.decode_head
    image_encoder = FoldedCellEncoder(model.backbone, head.lateral_proj, size_hw)
    return InferenceParts(
        image_encoder=image_encoder,
        decoder=FoldedTwoWayDecoder(head.decoder_q, head.decoder_v),
        descriptor_weight=head.q_proj.weight.detach(),
        descriptor_bias=head.q_proj.bias.detach(),
        logit_scale=1.0,
        grid_hw=image_encoder.grid_hw,
        size_hw=size_hw,
        memory_dim=model.config.decoder.query_dim,
        num_cells=model.config.image_encoder.num_cells,
    )


_FOLDS: Mapping[str, Callable[..., InferenceParts]] = {
    "clip_rc": _fold_clip_rc,
    "zegclip": _fold_zegclip,
}
