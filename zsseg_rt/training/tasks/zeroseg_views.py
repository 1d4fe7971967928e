"""What ZeroSeg's teacher sees of an image: all of it, and the cells of ever finer grids.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023, section 3.2: grids of 1x1 to 4x4, every cell at full input size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels; bottom and right are exclusive."""


@dataclass(frozen=True, kw_only=True)
class TeacherViews:
    """Which views of an image the teacher sees, and how.

    Attributes:
        grids: Cells per side of each grid, ascending, the whole image first. The paper's best are
            1, 2, 3 and 4.
        size: Side of a view, in pixels: the teacher's input.
        image_mean: The teacher's mean of R, G, B, in ``[0, 1]``.
        image_std: The teacher's standard deviation of R, G, B, in ``[0, 1]``.
    """

    grids: tuple[int, ...] = (1, 2, 3, 4)
    size: int = 224
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if not self.grids or self.grids[0] != 1 or list(self.grids) != sorted(set(self.grids)):
            raise ArgumentError(
                f"grids: expected ascending numbers that begin with 1, got {self.grids}. "
                "The paper's best are (1, 2, 3, 4)."
            )
        if self.size < 1:
            raise ArgumentError(f"size: expected at least 1 pixel, got {self.size}. Use 224.")

    @property
    def count(self) -> int:
        """Number of views per image: 30 for grids of 1 to 4."""
        return sum(side * side for side in self.grids)

    def boxes(self, size_hw: tuple[int, int]) -> tuple[Box, ...]:
        """Where the views are: grid by grid, each in raster order.

        Cell ``i`` of ``k`` reaches from ``round(i * length / k)`` to
        ``round((i + 1) * length / k)``, so the cells of a grid cover every pixel once.
        """
        if min(size_hw) < self.grids[-1]:
            raise ShapeError(
                f"images: expected at least {self.grids[-1]} pixels per side, got "
                f"{size_hw[0]}x{size_hw[1]}. Use larger images or coarser grids."
            )
        boxes = []
        for side in self.grids:
            rows, columns = (_bounds(length, side) for length in size_hw)
            boxes += [(*rows[i], *columns[j]) for i in range(side) for j in range(side)]
        return tuple(boxes)

    def cut(self, images: Tensor) -> Tensor:
        """Cut, resize (bicubic, antialiased) and normalise the views.

        Shapes:
            images: RGB, uint8 ``[B, 3, H, W]``.

        Returns:
            float32 ``[B, count, 3, size, size]``.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(
                f"images: expected [B, 3, H, W], got {list(images.shape)}. Give RGB planes."
            )
        if images.dtype != torch.uint8:
            raise DTypeError(f"images: expected uint8, got {images.dtype}. Give 8-bit pixels.")
        pixels = images.float() / 255
        views = [
            self._resized(pixels[:, :, top:bottom, left:right])
            for top, bottom, left, right in self.boxes((images.shape[2], images.shape[3]))
        ]
        mean = pixels.new_tensor(self.image_mean).view(3, 1, 1)
        std = pixels.new_tensor(self.image_std).view(3, 1, 1)
        return (torch.stack(views, dim=1) - mean) / std

    def _resized(self, cells: Tensor) -> Tensor:
        size_hw = (self.size, self.size)
        resized = F.interpolate(
            cells, size=size_hw, mode="bicubic", align_corners=False, antialias=True
        )
        return resized.clamp(0, 1)  # bicubic overshoots at edges


def _bounds(length: int, cells: int) -> list[tuple[int, int]]:
    edges = [round(i * length / cells) for i in range(cells + 1)]
    return list(itertools.pairwise(edges))


class ClipTeacher(nn.Module):
    """A frozen CLIP image encoder as teacher; it always stays in evaluation mode."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self._encode = _encode_function(encoder)

    def train(self, mode: bool = True) -> ClipTeacher:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Embed views float ``[N, 3, size, size]``; float32 ``[N, D]``, not normalised."""
        dtype = next(self.encoder.parameters()).dtype
        with torch.autocast(views.device.type, enabled=False):
            return self._encode(views.to(dtype)).float()


def _encode_function(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    method: Any = getattr(encoder, "encode_image", None)
    if callable(method):
        return lambda views: method(views)
    raise ArgumentError(
        f"encoder: expected a CLIP image tower or a model with encode_image, got "
        f"{type(encoder).__name__}. Build one with zsseg_rt.models.build_image_encoder."
    )
