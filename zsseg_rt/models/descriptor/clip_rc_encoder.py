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
from zsseg_rt.models.clip.image_encoder import (
    ImageEncoderConfig,
    PromptedImageEncoder,
    unit,
)

# Added to the scores of keys that a token must not see. Its exponential is zero in every precision,
# and, unlike infinity, it causes no NaN in blockwise attention kernels that meet only such keys.
BLOCKED = -1e4


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
