"""CLIP's image tower with a dense head: the last block attends so that patches stay local.

Every head changes the last block only. With X the tokens after the blocks before it (row 0 is the
class token), q, k, v its projections of ``ln_1(X)``, s = 1 / sqrt(head width), O its output
projection and M(Z) = Z + mlp(ln_2(Z)):

========== ===================================== ==================
head       attention A                           last block's Z
========== ===================================== ==================
vanilla    softmax(q k^T s)                      M(X + O(A v))
maskclip   identity                              M(X + O(v))
sclip      softmax(q q^T s) + softmax(k k^T s)   M(X + O(A v))
clearclip  softmax(q q^T s)                      O(A v)
naclip     softmax(k k^T s + prior)              O(A v)
sfp        see :mod:`zsseg_rt.models.dense.aggregating`
sc_clip    see there
========== =========================================================

Patch embeddings are ``ln_post(Z) @ proj`` without row 0, divided by their norms.

Source:
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
    2021; Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022; Wang et al.,
    "SCLIP", ECCV 2024; Lan et al., "ClearCLIP", ECCV 2024; Hajimiri et al., "Pay Attention to Your
    Neighbours" (NACLIP), WACV 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.models.clip.image_encoder import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
    resize_positional_embedding,
    unit,
)
from zsseg_rt.models.clip.transformer import ResidualBlock, merge_heads

Head = Literal["vanilla", "maskclip", "sclip", "clearclip", "naclip", "sfp", "sc_clip"]
HEADS: tuple[Head, ...] = get_args(Head)
Position = Literal["as_published", "size"]


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """What a head changes the last block into.

    Attributes:
        reads: Projections that it needs, in packing order.
        products: (query, key) pairs of projections; one softmax per pair, summed. None is identity.
        residual: Whether the block keeps its residual sum and its MLP.
        prior: Whether scores get the neighbour prior.
        aggregates: Whether alike patches share features: SFP and SC-CLIP.
        logit_scale: The authors' factor on cosines.
    """

    reads: str
    products: tuple[tuple[str, str], ...]
    residual: bool
    prior: bool = False
    aggregates: bool = False
    logit_scale: float


RULES: Mapping[Head, HeadRule] = {
    "vanilla": HeadRule(reads="qkv", products=(("q", "k"),), residual=True, logit_scale=100.0),
    "maskclip": HeadRule(reads="v", products=(), residual=True, logit_scale=100.0),
    "sclip": HeadRule(
        reads="qkv", products=(("q", "q"), ("k", "k")), residual=True, logit_scale=40.0
    ),
    "clearclip": HeadRule(reads="qv", products=(("q", "q"),), residual=False, logit_scale=50.0),
    "naclip": HeadRule(
        reads="kv", products=(("k", "k"),), residual=False, prior=True, logit_scale=40.0
    ),
    "sfp": HeadRule(
        reads="qkv",
        products=(("q", "q"), ("k", "k")),
        residual=False,
        aggregates=True,
        logit_scale=40.0,
    ),
    "sc_clip": HeadRule(
        reads="kv", products=(("k", "k"),), residual=False, aggregates=True, logit_scale=40.0
    ),
}


def neighbour_prior(grid_hw: tuple[int, int], std: float = 5.0) -> Tensor:
    """What NACLIP adds to the attention scores: a Gaussian of the distance between patches.

    ``prior[i, j] = exp(-|p_i - p_j|^2 / (2 std^2))`` in patches; 0 for the class token.

    Returns:
        float32 ``[1 + N, 1 + N]``, row-major over the grid, the class token first.
    """
    rows, columns = (
        torch.exp(-((torch.arange(size)[:, None] - torch.arange(size)) ** 2) / (2 * std**2))
        for size in grid_hw
    )
    return F.pad(torch.kron(rows, columns), (1, 0, 1, 0))


def attend_by_rule(rule: HeadRule, parts: Mapping[str, Tensor], prior: Tensor | None) -> Tensor:
    """``A @ v`` of one head's rule, ``[B, heads, 1 + N, W / heads]``."""
    value = parts["v"]
    attended = [
        F.scaled_dot_product_attention(parts[query], parts[key], value, attn_mask=prior)
        for query, key in rule.products
    ]
    return sum(attended[1:], attended[0]) if attended else value


class DenseImageEncoder(ImageEncoder):
    """CLIP's image tower with a dense head; the positional embedding is resized bicubically."""

    position_mode: ClassVar[Interpolation] = "bicubic"
    extra_tokens: ClassVar[int] = 1  # before the patches

    def __init__(
        self,
        config: ImageEncoderConfig,
        head: Head = "naclip",
        prior_std: float = 5.0,
        *,
        position: Position = "size",
    ) -> None:
        super().__init__(config)
        self.rule = RULES[head]
        self.prior_std = prior_std
        self.position = position

    def patch_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """See :meth:`ImageEncoder.patch_positions`."""
        rows, published = self.positional_embedding, self.position == "as_published"
        return resize_positional_embedding(
            rows, grid_hw, self.position_mode, as_published=published
        )[1:]

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode images.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            The head's patch embeddings, and CLIP's own class embedding, which no head changes;
            unit norm.
        """
        inputs = self.block_inputs(image)
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))
        cls_token = self.last_block(inputs[-1])[:, 0]
        return ImageEmbeds(self.dense_embeds(inputs, grid_hw), unit(self.project(cls_token)))

    @property
    def last_block(self) -> ResidualBlock:
        """The block whose attention the head replaces."""
        block = self.transformer.resblocks[-1]
        assert isinstance(block, ResidualBlock)
        return block

    def block_inputs(self, image: Tensor) -> list[Tensor]:
        """The tokens that each block gets, ``[B, 1 + N, W]``."""
        inputs = [self.embed_patches(image)]
        for block in self.transformer.resblocks[:-1]:
            inputs.append(block(inputs[-1]))
        return inputs

    def prior(self, grid_hw: tuple[int, int]) -> Tensor | None:
        """What the head adds to attention scores, ``[1 + N, 1 + N]``, or None."""
        return neighbour_prior(grid_hw, self.prior_std) if self.rule.prior else None

    def dense_embeds(self, inputs: list[Tensor], grid_hw: tuple[int, int]) -> Tensor:
        """The head's patch embeddings ``[B, N, D]`` of :meth:`block_inputs`, unit norm."""
        tokens, block, attention = inputs[-1], self.last_block, self.last_block.attn
        parts = attention.project(block.ln_1(tokens), self.rule.reads)
        prior = self.prior(grid_hw)
        attended = attend_by_rule(self.rule, parts, None if prior is None else prior.to(tokens))
        dense = attention.out_proj(merge_heads(attended))
        if self.rule.residual:
            dense = tokens + dense
            dense = dense + block.mlp(block.ln_2(dense))
        return self.embed_dense(dense[:, self.extra_tokens :])

    def patch_proj(self) -> Tensor:
        """Projection of patches into the joint space, ``[W, D]``."""
        return self.proj

    def embed_dense(self, patches: Tensor) -> Tensor:
        """Project patches ``[B, N, W]`` of the last block into the joint space, unit norm."""
        return unit(self.ln_post(patches) @ self.patch_proj())
