"""Whole images through ZeroSeg: GroupViT's sliding windows.

Source:
    Xu et al., "GroupViT", CVPR 2022: its segmentation inference, which ZeroSeg follows.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsseg_rt.models.sliding import Prepared, SlideSettings, check_picture, score_windows
from zsseg_rt.models.zeroseg.labels import check_threshold

LONGEST_SIDE = 2048  # GroupViT's limit for images of extreme proportions


class _Predictor(Prepared, Protocol):
    def predict(
        self, image: Tensor, text_embeds: Tensor, *, background_threshold: float | None
    ) -> Tensor: ...


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
    check_picture(rgb)
    height, width = rgb.shape[:2]
    limit = max(1, LONGEST_SIDE * min(height, width) // max(height, width))
    crop = LONGEST_SIDE if crop_size is None else crop_size
    windows = SlideSettings(short_side=min(short_side, limit), crop_size=crop, stride=stride)

    def predict(window: Tensor) -> Tensor:
        return model.predict(window, text_embeds, background_threshold=background_threshold)

    return score_windows(model, predict, rgb, windows)
