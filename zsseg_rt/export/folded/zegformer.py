"""ZegFormer split into the parts that are exported, with everything constant computed once."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ShapeError
from zsseg_rt.export.folded.clip import linear_from
from zsseg_rt.models.clip.image_encoder import unit
from zsseg_rt.models.clip.transformer import ResidualBlock, merge_heads, split_heads
from zsseg_rt.models.zegformer.backbone import FrozenBatchNorm, NormedConv, ResNet
from zsseg_rt.models.zegformer.decoder import QueryDecoder, SegmentPredictor, sine_positions
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.models.zegformer.regions import Clip

NATIVE_SIZE_HW = (512, 512)
_STRIDE = 4  # of the masks


class FoldedProposals(nn.Module):
    """From an image of one size to mask logits and segment embeddings; text is not used."""

    initial: Tensor
    positions: Tensor
    memory_positions: Tensor

    def __init__(self, model: ZegFormer, size_hw: tuple[int, int]) -> None:
        super().__init__()
        predictor = model.sem_seg_head.predictor
        self.size_hw = size_hw
        self.backbone = _fold_frozen_norms(model.backbone)
        self.pixel_decoder = copy.deepcopy(model.sem_seg_head.pixel_decoder)
        self.input_proj = copy.deepcopy(predictor.input_proj)
        self.decoder = _split_projections(predictor.transformer.decoder)
        self.mask_embed = copy.deepcopy(predictor.mask_embed)
        self.projection_layer = copy.deepcopy(predictor.projection_layer)
        positions = predictor.query_embed.weight.detach().unsqueeze(0)
        grid_hw = (size_hw[0] // 32, size_hw[1] // 32)
        self.register_buffer("positions", positions)
        self.register_buffer("initial", self._first_self_attention(positions))
        self.register_buffer(
            "memory_positions", sine_positions(grid_hw, positions.shape[2], positions)
        )
        self.no_object = linear_from(
            (predictor.logit_scale.exp() * predictor.bg_feature).detach(), torch.zeros(1)
        )

    def _first_self_attention(self, positions: Tensor) -> Tensor:
        """Queries start at zero, so the result of their first self-attention is constant."""
        layer: Any = self.decoder.layers[0]
        attended = layer.self_attn(positions, positions, torch.zeros_like(positions))
        return cast(Tensor, layer.norm1(attended)).detach()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Propose segments.

        Shapes:
            image: Normalised RGB planes, float ``[1, 3, *size_hw]``.

        Returns:
            ``region_masks`` ``[1, Q, H / 4, W / 4]``, ``segment_embeds`` ``[1, Q, D]``, unit norm,
            and ``no_object`` ``[1, Q]``, the last class logit.
        """
        maps = self.backbone(image)
        memory = self.input_proj(maps[-1]).flatten(2).transpose(1, 2)
        queries = self._decode(memory)
        features = self.pixel_decoder(maps)
        masks = self.mask_embed(queries) @ features.flatten(2)
        height, width = self.size_hw
        embeds = unit(self.projection_layer(queries))
        return (
            masks.reshape(1, -1, height // _STRIDE, width // _STRIDE),
            embeds,
            self.no_object(embeds).squeeze(2),
        )

    def _decode(self, memory: Tensor) -> Tensor:
        keys = memory + self.memory_positions
        first: Any = self.decoder.layers[0]
        x = self.initial
        x = first.norm2(x + first.multihead_attn(x + self.positions, keys, memory))
        x = first.norm3(x + first.linear2(F.relu(first.linear1(x))))
        for layer in list(self.decoder.layers)[1:]:
            x = layer(x, self.positions, keys, memory)
        return self.decoder.norm(x)  # type: ignore[no-any-return]


class FoldedRegionEncoder(nn.Module):
    """CLIP's image tower on a batch of crops; only the class token leaves its last block."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        visual = clip.visual
        self.visual = visual
        blocks = [cast(ResidualBlock, block) for block in visual.transformer.resblocks]
        self.blocks = nn.ModuleList(blocks[:-1])
        self.last = _FirstTokenBlock(blocks[-1])

    def forward(self, crops: Tensor) -> Tensor:
        """Embed crops ``[R, 3, s, s]``, normalised for CLIP, into ``[R, D]``, unit norm."""
        tokens = self.visual.embed_patches(crops)
        for block in self.blocks:
            tokens = block(tokens)
        return unit(self.visual.project(self.last(tokens)).squeeze(1))


@dataclass(frozen=True, kw_only=True)
class ZegFormerParts:
    """What a ZegFormer is exported as.

    Attributes:
        image_encoder: From image to segments.
        region_encoder: From crops to CLIP's embeddings; None if CLIP classifies no regions.
        size_hw: Size of the image.
        grid_hw: Size of the masks.
        num_regions: Queries Q.
        embed_dim: Width D of the joint space.
        segment_scale: Multiplies the cosine of segments and classes.
        region_scale: Multiplies the cosine of regions and classes.
        region_side: Side of a crop in pixels.
    """

    image_encoder: FoldedProposals
    region_encoder: FoldedRegionEncoder | None
    size_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    num_regions: int
    embed_dim: int
    segment_scale: float
    region_scale: float
    region_side: int


@torch.no_grad()
def fold_zegformer(model: ZegFormer, size_hw: tuple[int, int] | None = None) -> ZegFormerParts:
    """Split a ZegFormer into the parts that are exported.

    Batch norms are folded into their convolutions, the first self-attention of the queries and the
    positional encodings are constants, and only the last layer's segments leave the decoder.

    Returns:
        The parts.
    """
    size_hw = size_hw or NATIVE_SIZE_HW
    divisor = max(model.config.size_divisor, 32)
    if min(size_hw) < divisor or max(size_hw) > 4096 or any(side % divisor for side in size_hw):
        raise ShapeError(
            f"size_hw: expected multiples of {divisor} up to 4096, got {size_hw[0]}x{size_hw[1]}. "
            "Images are stretched to this size, so nothing is padded."
        )
    predictor: SegmentPredictor = model.sem_seg_head.predictor
    clip = None if model.config.fusion == "segments" else model.clip_model
    return ZegFormerParts(
        image_encoder=FoldedProposals(model, size_hw).eval(),
        region_encoder=None if clip is None else FoldedRegionEncoder(clip).eval(),
        size_hw=size_hw,
        grid_hw=(size_hw[0] // _STRIDE, size_hw[1] // _STRIDE),
        num_regions=model.config.decoder.num_queries,
        embed_dim=model.config.decoder.embed_dim,
        segment_scale=math.exp(float(predictor.logit_scale)),
        region_scale=1.0 if clip is None else math.exp(float(clip.logit_scale)),
        region_side=0 if clip is None else clip.image_side,
    )


class _FirstTokenBlock(nn.Module):
    """The output of a residual block for the first token, ``[K, N, W]`` to ``[K, 1, W]``."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        width = weight.shape[1]
        self.block = block
        self.q_proj = linear_from(weight[:width].contiguous(), bias[:width].contiguous())
        self.kv_proj = linear_from(weight[width:].contiguous(), bias[width:].contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        attention = self.block.attn
        normed = self.block.ln_1(tokens)
        keys, values = self.kv_proj(normed).chunk(2, dim=-1)
        parts = self.q_proj(normed[:, :1]), keys, values
        q, k, v = (split_heads(part, attention.num_heads) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = tokens[:, :1] + attention.out_proj(merge_heads(attended))
        return x + self.block.mlp(self.block.ln_2(x))  # type: ignore[no-any-return]


class _SplitAttention(nn.Module):
    """Attention whose packed projection is three matrices, so that none is split at run time."""

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.num_heads: int = packed.num_heads
        weights, biases = packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            linear_from(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = copy.deepcopy(packed.out_proj)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        projected = self.q_proj(queries), self.k_proj(keys), self.v_proj(values)
        q, k, v = (split_heads(part, self.num_heads) for part in projected)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(merge_heads(attended))  # type: ignore[no-any-return]


def _split_projections(decoder: QueryDecoder) -> QueryDecoder:
    split = copy.deepcopy(decoder)
    for layer in split.layers:
        for name in ("self_attn", "multihead_attn"):
            setattr(layer, name, _SplitAttention(getattr(layer, name)))
    return split


def _fold_frozen_norms(backbone: ResNet) -> ResNet:
    """A copy whose convolutions scale and shift as their frozen norms did."""
    folded = copy.deepcopy(backbone)
    for module in folded.modules():
        if not isinstance(module, NormedConv) or not isinstance(module.norm, FrozenBatchNorm):
            continue
        norm = module.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        module.weight = nn.Parameter(module.weight * scale.view(-1, 1, 1, 1))
        module.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        module.norm = nn.Identity()
    return folded
