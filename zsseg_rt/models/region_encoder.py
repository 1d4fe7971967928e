"""CLIP-RC's image tower: ZegCLIP's with region tokens that see their own part of the picture.

Source: Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation",
CVPR 2024. The official mask has one fixed size; here it is made for any grid, and equal to the
official one for the grid that the positional embedding is stored for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ShapeError
from zsseg_rt.models.image_encoder import (
    FoldedBlock,
    FoldedImageEncoder,
    ImageEncoderConfig,
    PromptedImageEncoder,
    linear_from,
    unit,
)

__all__ = [
    "FoldedRegionEncoder",
    "RegionEmbeds",
    "RegionImageEncoder",
    "attention_allowed",
    "region_of_patches",
    "upsample_regions",
]

# Added to the scores of keys that a token must not see. Its exponential is zero in every precision,
# and, unlike infinity, a block of such keys alone is no NaN in attention kernels that go by blocks.
_BLOCKED = -1e4


class RegionEmbeds(NamedTuple):
    """What the region image tower gives.

    Attributes:
        patch_embeds: ``[B, N, D]``, row-major over the grid, unit norm.
        cls_embed: ``[B, D]``, unit norm.
        region_embeds: ``[B, R, D]``, row-major over the square grid of regions, unit norm.
    """

    patch_embeds: Tensor
    cls_embed: Tensor
    region_embeds: Tensor


def region_of_patches(
    grid_hw: tuple[int, int], num_regions: int, *, official: bool = False
) -> Tensor:
    """Which region each patch lies in: the grid cut evenly into a square number of regions.

    Where the side of the regions does not divide the grid, some regions get a row or column of
    patches more than others; a grid smaller than that leaves regions without patches.

    Args:
        grid_hw: Patch grid, rows and columns.
        num_regions: R, a square number.
        official: Whether all regions are of one size, as in the official code: the last rows and
            columns that do not fill another region lie in none.

    Returns:
        int64 ``[N]``, row-major over the grid, values in ``[0, R)``; R for a patch in no region.
    """
    side = math.isqrt(num_regions)

    def cut(size: int) -> Tensor:
        positions = torch.arange(size)
        if not official:
            return positions * side // size
        stride = size // side
        return (positions // max(stride, 1)).masked_fill(positions >= side * stride, num_regions)

    rows, columns = (cut(size) for size in grid_hw)
    return (rows[:, None] * side + columns).clamp(max=num_regions).flatten()


def attention_allowed(
    grid_hw: tuple[int, int], num_regions: int, num_prompts: int, *, official: bool = False
) -> Tensor:
    """Which token may see which: rows see columns, in the order class, prompts, patches, regions.

    Class, prompts and patches see each other. A region and its own patches see each other, and a
    region sees itself; no other token sees a region, and a region sees no other token.

    Args:
        grid_hw: Patch grid, rows and columns.
        num_regions: R, a square number.
        num_prompts: P.
        official: See :func:`region_of_patches`.

    Returns:
        bool ``[1 + P + N + R, 1 + P + N + R]``.
    """
    regions = region_of_patches(grid_hw, num_regions, official=official)
    inside = F.one_hot(regions, num_regions + 1)[:, :num_regions].bool()
    first_patch = 1 + num_prompts
    first_region = first_patch + len(inside)
    size = first_region + num_regions
    allowed = torch.zeros(size, size, dtype=torch.bool)
    allowed[:first_region, :first_region] = True
    allowed[first_patch:first_region, first_region:] = inside
    allowed[first_region:, first_patch:first_region] = inside.T
    allowed[first_region:, first_region:] = torch.eye(num_regions, dtype=torch.bool)
    return allowed


def upsample_regions(region_embeds: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Spread regions over the patch grid, bilinearly with ``align_corners=False``.

    Args:
        region_embeds: ``[B, R, D]``, R a square number.
        grid_hw: Patch grid, rows and columns.

    Returns:
        ``[B, N, D]``.
    """
    side = math.isqrt(region_embeds.shape[1])
    regions = torch.unflatten(region_embeds.transpose(1, 2), 2, (side, side))
    spread = F.interpolate(regions, size=grid_hw, mode="bilinear", align_corners=False)
    return spread.flatten(2).transpose(1, 2)


class RegionImageEncoder(PromptedImageEncoder):
    """The prompted image tower with region tokens behind the patches.

    Region tokens have no position and get no ``prompt_norm``; what they see is all that tells them
    apart, for officially they all start as one vector and are frozen.

    Args:
        config: Sizes; ``num_regions`` is a square number.
        exact: Whether to refuse grids other than the one the positional embedding is stored for,
            as the official code does.
    """

    def __init__(self, config: ImageEncoderConfig, *, exact: bool = False) -> None:
        super().__init__(config)
        self.exact = exact
        self.region_level_bridge = nn.Parameter(torch.zeros(config.num_regions, config.width))

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid; see :meth:`ImageEncoder.grid_hw`.

        Raises:
            ShapeError: The picture is smaller than one patch, or ``exact`` is set and the grid is
                not the official one.
        """
        grid_hw = super().grid_hw(size_hw)
        side, patch = self.config.grid_side, self.config.patch_size
        if self.exact and grid_hw != (side, side):
            raise ShapeError(
                f"image: expected {side * patch}x{side * patch} pixels in exact mode, got "
                f"{size_hw[0]}x{size_hw[1]}. The official region mask has one size: resize or crop "
                "the picture, or build the model with exact=False."
            )
        return grid_hw

    def attention_allowed(self, grid_hw: tuple[int, int], num_prompts: int) -> Tensor:
        """The mask for a grid: officially cut where it is the official grid, else evenly."""
        official = grid_hw == (self.config.grid_side,) * 2
        return attention_allowed(grid_hw, self.config.num_regions, num_prompts, official=official)

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class, patch and region tokens after ``ln_pre``, ``[B, 1 + N + R, W]``."""
        regions = self.region_level_bridge.expand(image.shape[0], -1, -1)
        return self.ln_pre(torch.cat([self.input_tokens(image), regions], dim=1))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> RegionEmbeds:  # type: ignore[override]
        """Encode pictures.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            Unit-norm patch, class and region embeddings.

        Raises:
            ShapeError: The image has another layout or a size the tower does not take.
            DTypeError: The image is not of the weights' dtype.
        """
        tokens, num_regions = self.embed_patches(image), self.config.num_regions
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))

        def mask_of(num_prompts: int) -> Tensor:
            return self.attention_allowed(grid_hw, num_prompts).to(image.device)

        cls_token, prompts, others = self.run_blocks(tokens, mask_of)
        seeing_all = torch.cat([cls_token, prompts, others[:, :-num_regions]], dim=1)
        normed = self.prompt_norm(seeing_all)
        embeds = self.project(torch.cat([normed, others[:, -num_regions:]], dim=1))
        patches = embeds[:, 1 + prompts.shape[1] : -num_regions]
        return RegionEmbeds(unit(patches), unit(embeds[:, 0]), unit(embeds[:, -num_regions:]))


class FoldedRegionEncoder(FoldedImageEncoder):
    """A :class:`RegionImageEncoder` and the projection of its patches, for one input size.

    As :class:`FoldedImageEncoder`. Besides, the region tokens start as constants, the mask is a
    constant that is added to the scores, and the projection of ``[region, class, patch]`` is made
    of each part alone: a region is projected before it is spread over the grid.

    Args:
        encoder: The encoder to fold; large unchanged weights are shared with it, not copied.
        patch_proj: Linear layer from ``[region, class, patch]``, each of width D, to E.
        size_hw: Picture size in pixels.
    """

    region_tokens: Tensor
    mask: Tensor
    spread: Tensor

    def __init__(
        self, encoder: RegionImageEncoder, patch_proj: nn.Linear, size_hw: tuple[int, int]
    ) -> None:
        super().__init__(encoder, size_hw)
        self.num_regions = encoder.config.num_regions
        with torch.no_grad():
            self._fold_regions(encoder, patch_proj)
        self.eval()

    def _fold_regions(self, encoder: RegionImageEncoder, patch_proj: nn.Linear) -> None:
        device = self.positions.device
        tokens = encoder.ln_pre(encoder.region_level_bridge)[None]
        self.register_buffer("region_tokens", tokens)
        allowed = encoder.attention_allowed(self.grid_hw, 0)
        # The folded prompts are the last keys; regions do not see them.
        sees_prompts = torch.ones(len(allowed), encoder.config.num_prompts, dtype=torch.bool)
        sees_prompts[-self.num_regions :] = False
        allowed = torch.cat([allowed, sees_prompts], dim=1)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, _BLOCKED)
        self.register_buffer("mask", mask.to(device))
        spread = upsample_regions(torch.eye(self.num_regions)[None], self.grid_hw)
        self.register_buffer("spread", spread.to(device))
        no_bias = torch.zeros_like(patch_proj.bias)
        region, cls, patch = patch_proj.weight.chunk(3, dim=1)
        self.region_proj = linear_from(region.contiguous(), no_bias)
        self.cls_proj = linear_from(cls.contiguous(), patch_proj.bias)
        self.patch_proj = linear_from(patch.contiguous(), no_bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode one picture of the one size.

        Args:
            image: Normalised RGB planes, float ``[1, 3, *size_hw]``.

        Returns:
            ``patch_embeds`` ``[1, N, E]``, the projected region-aware patches, and ``cls_embed``
            ``[R, D]``, the sum of each region's and the picture's unit-norm embeddings.
        """
        tokens = torch.cat([self.embed_patches(image), self.region_tokens], dim=1)
        num_keys = tokens.shape[1]
        for block in self.blocks:
            assert isinstance(block, FoldedBlock)
            mask = self.mask if block.prompt_keys.shape[2] else self.mask[:, :num_keys]
            tokens = block(tokens, mask)
        seeing_all = self.project(self.prompt_norm(tokens[:, : -self.num_regions]))
        regions = self.project(tokens[:, -self.num_regions :])
        cls_embed, patches = seeing_all[:, :1], seeing_all[:, 1:]
        spread = self.spread @ self.region_proj(regions)
        patch_embeds = self.patch_proj(patches) + (spread + self.cls_proj(cls_embed))
        return patch_embeds, (regions + cls_embed)[0]
