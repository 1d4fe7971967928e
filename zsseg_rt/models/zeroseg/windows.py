"""Whole images through ZeroSeg: GroupViT's sliding windows.

Source:
    Xu et al., "GroupViT", CVPR 2022: its segmentation inference, which ZeroSeg follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zsseg_rt.errors import ShapeError
from zsseg_rt.models.sliding import prepare_image, slide_scores
from zsseg_rt.models.zeroseg.labels import check_threshold

LONGEST_SIDE = 2048  # GroupViT's limit for images of extreme proportions


class _Predictor(Protocol):
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def predict(
        self, image: Tensor, text_embeds: Tensor, *, background_threshold: float | None
    ) -> Tensor: ...

    def parameters(self) -> Iterator[Any]: ...


@torch.no_grad()
def segment_predict(
    model: _Predictor,
    rgb: NDArray[np.uint8],
    text_embeds: Tensor,
    *,
    short_side: int = 448,
    crop_size: int | None = 448,
    stride: int = 224,
    background_threshold: float | None = None,
) -> Tensor:
    """Score every class at every pixel of a whole image, as GroupViT's evaluation does.

    Resize so that the short side is ``short_side`` (and the long one at most 2048), normalise,
    average the class scores of overlapping windows, upsample them to the image.

    Shapes:
        rgb: uint8 ``[H, W, 3]``, RGB.
        text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.

    Returns:
        ``[C, H, W]`` at the image's size; with a threshold ``[1 + C, H, W]``, background first.
        ``.argmax(0)`` gives labels.
    """
    check_threshold(background_threshold)
    crop = crop_size if crop_size is not None else LONGEST_SIDE
    if min(short_side, crop, stride) < 1 or (crop_size is not None and stride > crop):
        raise ShapeError(
            f"stride: expected 1 <= stride <= crop_size and a positive short_side, got stride "
            f"{stride}, crop_size {crop_size}, short_side {short_side}. Windows must touch."
        )
    short_side = _limited_short_side(rgb, short_side)
    image = prepare_image(rgb, short_side=short_side, mean=model.image_mean, std=model.image_std)
    image = image.to(next(model.parameters()).device)

    def predict(window: Tensor) -> Tensor:
        return model.predict(window, text_embeds, background_threshold=background_threshold)

    if crop_size is None:
        scores = predict(image)
    else:
        scores = slide_scores(predict, image, crop_size=crop_size, stride=stride)
    return F.interpolate(scores, size=rgb.shape[:2], mode="bilinear", align_corners=False)[0]


def _limited_short_side(rgb: NDArray[np.uint8], short_side: int) -> int:
    """The short side at which the long one does not exceed its limit."""
    if rgb.ndim != 3 or 0 in rgb.shape:
        return short_side  # prepare_image refuses it
    height, width = int(rgb.shape[0]), int(rgb.shape[1])
    return max(1, min(short_side, LONGEST_SIDE * min(height, width) // max(height, width)))
