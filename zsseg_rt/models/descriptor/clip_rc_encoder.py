"""CLIP-RC's image tower: ZegCLIP's, with cell tokens that see their own part of the image.

Source: Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation",
CVPR 2024. The official mask has one fixed size; here it is built for any grid, and equals the
official one on the grid that the positional embedding is stored for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ShapeError
from zsseg_rt.models.clip.folded_image_encoder import (
    FoldedBlock,
    FoldedImageEncoder,
    linear_from,
)
from zsseg_rt.models.clip.image_encoder import (
    ImageEncoderConfig,
    PromptedImageEncoder,
    unit,
)

# Added to the scores of keys that a token must not see. Its exponential is zero in every precision,
# and, unlike infinity, it causes no NaN in blockwise attention kernels that meet only such keys.
_BLOCKED = -1e4


class CellEmbeds(NamedTuple):
    """What the cell image tower returns.

    Attributes:
        patch_embeds: ``[B, N, D]``, row-major over the grid, unit norm.
        cls_embed: ``[B, D]``, unit norm.
        cell_embeds: ``[B, R, D]``, row-major over the square grid of cells, unit norm.
    """

    patch_embeds: Tensor
    cls_embed: Tensor
    cell_embeds: Tensor


def cell_of_patches(grid_hw: tuple[int, int], num_cells: int, *, official: bool = False) -> Tensor:
    """Which cell each patch lies in: the grid cut evenly into a square number of cells.

    If the cells per side do not divide the grid evenly, some cells get one row or column of
    patches more than others; a grid smaller than that leaves some cells without patches.

    Returns:
        int64 ``[N]``, row-major over the grid, values in ``[0, R)``; R for a patch in no cell.
    """
    side = math.isqrt(num_cells)

    def cut(size: int) -> Tensor:
        positions = torch.arange(size)
        if not official:
            return positions * side // size
        stride = size // side
        return (positions // max(stride, 1)).masked_fill(positions >= side * stride, num_cells)

    rows, columns = (cut(size) for size in grid_hw)
    return (rows[:, None] * side + columns).clamp(max=num_cells).flatten()


def attention_allowed(
    grid_hw: tuple[int, int], num_cells: int, num_prompts: int, *, official: bool = False
) -> Tensor:
    """Which token may see which: rows see columns, ordered class, prompts, patches, cells.

    Class, prompts and patches see each other. A cell and its own patches see each other, and a
    cell sees itself; no other token sees a cell, and a cell sees no other token.

    Returns:
        bool ``[1 + P + N + R, 1 + P + N + R]``.
    """
    cells = cell_of_patches(grid_hw, num_cells, official=official)
    inside = F.one_hot(cells, num_cells + 1)[:, :num_cells].bool()
    first_patch = 1 + num_prompts
    first_cell = first_patch + len(inside)
    size = first_cell + num_cells
    allowed = torch.zeros(size, size, dtype=torch.bool)
    allowed[:first_cell, :first_cell] = True
    allowed[first_patch:first_cell, first_cell:] = inside
    allowed[first_cell:, first_patch:first_cell] = inside.T
    allowed[first_cell:, first_cell:] = torch.eye(num_cells, dtype=torch.bool)
    return allowed


def upsample_cells(cell_embeds: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Spread cells over the patch grid, bilinearly with ``align_corners=False``.

    Shapes:
        cell_embeds: ``[B, R, D]``, R a square number.

    Returns:
        ``[B, N, D]``.
    """
    side = math.isqrt(cell_embeds.shape[1])
    cells = torch.unflatten(cell_embeds.transpose(1, 2), 2, (side, side))
    spread = F.interpolate(cells, size=grid_hw, mode="bilinear", align_corners=False)
    return spread.flatten(2).transpose(1, 2)


class CellImageEncoder(PromptedImageEncoder):
    """The prompted image tower with cell tokens after the patches.

    Cell tokens have no position and get no ``prompt_norm``; what they see is all that tells them
    apart, because officially they all start as one vector and are frozen.
    """

    def __init__(self, config: ImageEncoderConfig, *, exact: bool = False) -> None:
        super().__init__(config)
        self.exact = exact
        self.region_level_bridge = nn.Parameter(torch.zeros(config.num_cells, config.width))

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid; see :meth:`ImageEncoder.grid_hw`."""
        grid_hw = super().grid_hw(size_hw)
        grid_side, side = self.config.grid_side, self.config.side
        if self.exact and grid_hw != (grid_side, grid_side):
            raise ShapeError(
                f"image: expected {side}x{side} pixels in exact mode, got "
                f"{size_hw[0]}x{size_hw[1]}. The official cell mask has one size: resize or crop "
                "the image, or build the model with exact=False."
            )
        return grid_hw

    def attention_allowed(self, grid_hw: tuple[int, int], num_prompts: int) -> Tensor:
        """The mask for a grid: as in the official code on the official grid, else cut evenly."""
        official = grid_hw == (self.config.grid_side,) * 2
        return attention_allowed(grid_hw, self.config.num_cells, num_prompts, official=official)

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class, patch and cell tokens after ``ln_pre``, ``[B, 1 + N + R, W]``."""
        cells = self.region_level_bridge.expand(image.shape[0], -1, -1)
        return self.ln_pre(torch.cat([self.input_tokens(image), cells], dim=1))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> CellEmbeds:  # type: ignore[override]
        """Encode images.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            Unit-norm patch, class and cell embeddings.
        """
        tokens, num_cells = self.embed_patches(image), self.config.num_cells
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))

        def mask_of(num_prompts: int) -> Tensor:
            return self.attention_allowed(grid_hw, num_prompts).to(image.device)

        cls_token, prompts, others = self.run_blocks(tokens, mask_of)
        seeing_all = torch.cat([cls_token, prompts, others[:, :-num_cells]], dim=1)
        normed = self.prompt_norm(seeing_all)
        embeds = self.project(torch.cat([normed, others[:, -num_cells:]], dim=1))
        patches = embeds[:, 1 + prompts.shape[1] : -num_cells]
        return CellEmbeds(unit(patches), unit(embeds[:, 0]), unit(embeds[:, -num_cells:]))


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
        self,
        encoder: CellImageEncoder,
        patch_proj: nn.Linear,
        size_hw: tuple[int, int],
        *,
        with_clip_embeds: bool = False,
    ) -> None:
        super().__init__(encoder, size_hw)
        self.with_clip_embeds = with_clip_embeds
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
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, _BLOCKED)
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
            ``[R, D]``, the sum of each cell's and the image's unit-norm embeddings; with
            ``with_clip_embeds`` also ``[1, N, D]``, the patches' unit-norm embeddings.
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
        outputs = patch_embeds, (cells + cls_embed)[0]
        return (*outputs, patches) if self.with_clip_embeds else outputs
