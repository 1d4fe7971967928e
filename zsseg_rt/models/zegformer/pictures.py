"""Images for ZegFormer: what it takes, and how the official evaluation resizes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsseg_rt.errors import DTypeError, ShapeError

LONGEST_SIDE = 2048


def resize_picture(
    rgb: NDArray[np.uint8], short_side: int, long_side: int = LONGEST_SIDE
) -> NDArray[np.uint8]:
    """Resize antialiased, sides rounded half up, as detectron2's ``ResizeShortestEdge``.

    Shapes:
        rgb: uint8 ``[H, W, 3]``, RGB.
    """
    from PIL import Image

    scale = short_side / min(rgb.shape[:2])
    sides = [side * scale for side in rgb.shape[:2]]
    if max(sides) > long_side:
        scale = long_side / max(sides)
        sides = [side * scale for side in sides]
    height, width = (int(side + 0.5) for side in sides)
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


def check_pictures(images: Sequence[Tensor], out_hw: Sequence[tuple[int, int]]) -> None:
    """Refuse images that are not uint8 ``[3, h, w]``, and sizes that do not match them."""
    if not len(images) or len(images) != len(out_hw):
        raise ShapeError(
            f"images: expected at least one image and an out_hw for each, got {len(images)} "
            f"images and {len(out_hw)} sizes. Give one (height, width) per image."
        )
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise ShapeError(
                f"images[{index}]: expected [3, h, w], got {list(image.shape)}. Give RGB planes."
            )
        if image.dtype != torch.uint8:
            raise DTypeError(
                f"images[{index}]: expected uint8, got {image.dtype}. "
                "Give the image in 0..255; the model normalises it."
            )
    for index, size in enumerate(out_hw):
        if len(size) != 2 or min(size) < 1:
            raise ShapeError(
                f"out_hw[{index}]: expected a height and width of at least 1 pixel, got "
                f"{list(size)}. Give the size of the score maps."
            )
