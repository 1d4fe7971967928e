"""ZegFormer's second classification: CLIP looks at the region of each segment."""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt import ops
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


def crop_regions(image: Tensor, mask_logits: Tensor, *, style: RegionStyle, side: int) -> Tensor:
    """Cut out what CLIP is shown of each segment; see :func:`zsseg_rt.ops.crop_regions`.

    ``"cropmask"``: the box, with pixels outside the mask set to zero. ``"crop"``: the box.
    ``"mask"``: the whole image, resized, pixels outside the resized mask set to zero. Boxes are
    sampled by RoIAlign, half-pixel aligned, and are stretched to a square.

    Args:
        image: Normalised RGB planes, float ``[3, H, W]``.
        mask_logits: Mask logits of any resolution, ``[K, h, w]``; inside is above zero.
        style: What to show.
        side: Side of the results, in pixels.

    Returns:
        ``[K, 3, side, side]``.
    """
    planes, masks = (x.detach().float().cpu().contiguous().numpy() for x in (image, mask_logits))
    boxes, regions = ops.mask_boxes(masks, planes.shape[1:]), np.arange(len(masks), dtype=np.int32)
    crops = ops.crop_regions(planes, masks, regions, boxes, side=side, style=style)
    return torch.from_numpy(np.asarray(crops)).to(image)
