"""ZegFormer's second classification: CLIP looks at the region of each segment."""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.image_encoder import ImageEncoder, ImageEncoderConfig
from zsseg_rt.models.clip.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.models.clip.transformer import ResidualBlock, attend

RegionStyle = Literal["cropmask", "mask", "crop"]
REGION_STYLES: tuple[str, ...] = get_args(RegionStyle)


class Clip(TextEncoder):
    """Both towers of CLIP, named as in OpenAI's files; calling it embeds prompts."""

    def __init__(self, visual: ImageEncoderConfig, text: TextEncoderConfig) -> None:
        super().__init__(text)
        self.visual = ImageEncoder(visual)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    @property
    def image_side(self) -> int:
        """Side in pixels of the images that the image tower was trained on."""
        return self.visual.config.side

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed normalised images ``[K, 3, s, s]`` into ``[K, D]``, **not** normalised."""
        tokens = self.visual.embed_patches(images)
        blocks = [cast(ResidualBlock, block) for block in self.visual.transformer.resblocks]
        for block in blocks[:-1]:
            tokens = block(tokens)
        return self.visual.project(_run_on_first(blocks[-1], tokens))


def _run_on_first(block: ResidualBlock, tokens: Tensor) -> Tensor:
    """A block's output for the first of ``[K, N, W]`` tokens only, ``[K, W]``."""
    attention, width = block.attn, tokens.shape[2]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed, x = block.ln_1(tokens), tokens[:, :1]
    keys, values = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    query = F.linear(normed[:, :1], weight[:width], bias[:width])
    x = x + attention.out_proj(attend(query, keys, values, attention.num_heads))
    return (x + block.mlp(block.ln_2(x))).squeeze(1)  # type: ignore[no-any-return]


def upsample_masks(mask_logits: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize mask logits ``[Q, h, w]`` to ``[Q, *size_hw]``, bilinear."""
    upsampled = F.interpolate(
        mask_logits.unsqueeze(0), size=size_hw, mode="bilinear", align_corners=False
    )
    return upsampled.squeeze(0)


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes around masks.

    Args:
        masks: Which pixels belong to each mask, bool ``[Q, H, W]``.

    Returns:
        Columns and rows ``x1, y1, x2, y2`` of the first and last pixel, int64 ``[Q, 4]``; the last
        ones belong to the mask. An empty mask, or one that is a single pixel wide or high, gets
        ``0, 0, W, H``.
    """
    height, width = masks.shape[1:]
    x1, x2 = _first_and_last(masks.any(dim=1))
    y1, y2 = _first_and_last(masks.any(dim=2))
    boxes = torch.stack([x1, y1, x2, y2], dim=1)
    degenerate = (x2 <= x1) | (y2 <= y1)
    canvas = torch.tensor([0, 0, width, height], device=masks.device)
    return torch.where(degenerate.unsqueeze(1), canvas, boxes)


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true column of ``[Q, N]``; an empty row gives ``N, -1``."""
    columns = torch.arange(present.shape[1], device=present.device)
    first = torch.where(present, columns, present.shape[1]).amin(dim=1)
    return first, torch.where(present, columns, -1).amax(dim=1)


def crop_regions(
    image: Tensor, mask_logits: Tensor, boxes: Tensor, *, style: RegionStyle, side: int
) -> Tensor:
    """Cut out what CLIP is shown of each segment.

    ``"cropmask"``: the box, with pixels outside the mask set to zero. ``"crop"``: the box.
    ``"mask"``: the whole image, resized, pixels outside the resized mask set to zero. Boxes are
    sampled by RoIAlign, half-pixel aligned, and are stretched to a square.

    Args:
        image: Normalised RGB planes, float ``[3, H, W]``.
        mask_logits: Mask logits at the image's resolution, ``[K, H, W]``; inside is above zero.
        boxes: ``x1, y1, x2, y2`` of each mask, int64 ``[K, 4]``, within the image; see
            :func:`mask_boxes`.
        style: What to show.
        side: Side of the results, in pixels.

    Returns:
        ``[K, 3, side, side]``.

    Source:
        He et al., "Mask R-CNN", ICCV 2017, for RoIAlign.
    """
    if style == "mask":
        small = F.interpolate(image.unsqueeze(0), size=(side, side), mode="bilinear")
        return small * (upsample_masks(mask_logits, (side, side)) > 0).unsqueeze(1)
    crops = image.new_empty(len(boxes), 3, side, side)
    for crop, logits, box in zip(crops, mask_logits, boxes.tolist(), strict=True):
        mask = logits > 0 if style == "cropmask" else None
        crop.copy_(_roi_align(image, mask, box, side))
    return crops


def _roi_align(image: Tensor, mask: Tensor | None, box: list[int], side: int) -> Tensor:
    """RoIAlign as two matrix products: sampling is separable. Only the box's pixels are read."""
    x1, y1, x2, y2 = box
    rows, row_weights = _axis_weights(y1, y2, image.shape[1], side, image)
    columns, column_weights = _axis_weights(x1, x2, image.shape[2], side, image)
    pixels = image[:, rows, columns]
    if mask is not None:
        pixels = pixels * mask[rows, columns]
    return row_weights @ (pixels @ column_weights.T)


def _axis_weights(start: int, end: int, size: int, side: int, like: Tensor) -> tuple[slice, Tensor]:
    """The weight of each pixel of one axis in each of ``side`` bins of ``[start, end]``.

    A bin is the mean of as many equally spaced linear samples as it is pixels long, rounded up;
    samples beyond the outermost pixel centres repeat that pixel. float32 in this order of
    operations, because on long boxes another order moves samples by 1e-4 pixels.

    Returns:
        The pixels that count, and their weights ``[side, pixels]``.
    """
    length = torch.tensor(float(end - start), device=like.device)
    num_samples = max(1, -(-(end - start) // side))
    bin_length = length / side
    bins = torch.arange(side, dtype=torch.float32, device=like.device).unsqueeze(1)
    samples = torch.arange(num_samples, dtype=torch.float32, device=like.device) + 0.5
    at = ((start - 0.5) + bins * bin_length) + samples * bin_length / num_samples
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=size - 1)
    fraction = at - low
    first, last = int(low[0, 0]), int(high[-1, -1])
    weights = torch.zeros(side, last - first + 1, device=like.device)
    weights.scatter_add_(1, low - first, 1 - fraction)
    weights.scatter_add_(1, high - first, fraction)
    return slice(first, last + 1), (weights / num_samples).to(like.dtype)
