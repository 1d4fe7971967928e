"""CLIP's towers as CAT-Seg tunes and reads them."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.image_encoder import ImageEncoder, ImageEncoderConfig
from zsseg_rt.models.clip.transformer import Attention, ResidualBlock, Transformer


class SplitAttention(Attention):
    """Attention whose weights of q, k and v are tensors of their own: only q and v are tuned."""

    def __init__(self, width: int, num_heads: int) -> None:
        nn.Module.__init__(self)
        self.num_heads = num_heads
        for name in "qkv":
            weight = nn.Parameter(torch.empty(width, width))
            self.register_parameter(f"{name}_proj_weight", weight)
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The packed weight, rows q, k, v."""
        return torch.cat([getattr(self, f"{name}_proj_weight") for name in "qkv"])


def split_attention(transformer: Transformer) -> None:
    """Give every block of a transformer a :class:`SplitAttention` without values."""
    for block in cast("list[ResidualBlock]", transformer.resblocks):
        width = block.attn.out_proj.in_features
        block.attn = SplitAttention(width, block.attn.num_heads)


class DenseFeatures(NamedTuple):
    """What :class:`DenseFeatureEncoder` returns, class token first.

    Attributes:
        embeds: In the joint space, ``[B, 1 + N, D]``, not normalised.
        taps: Outputs of two earlier blocks, patches only, ``[B, W, g, g]`` each.
    """

    embeds: Tensor
    taps: tuple[Tensor, Tensor]


class DenseFeatureEncoder(ImageEncoder):
    """CLIP's image tower; in its last block every token attends to itself alone.

    With v and O its projections and M(Z) = Z + mlp(ln_2(Z)), the last block gives
    ``M(O(v(ln_1(X))) + X[0])``: the class token is the residual of all tokens.
    """

    position_mode = "bicubic"

    def __init__(self, config: ImageEncoderConfig, taps: tuple[int, int]) -> None:
        super().__init__(config)
        self.taps = taps
        split_attention(self.transformer)

    def forward(self, image: Tensor) -> DenseFeatures:  # type: ignore[override]
        """Encode images, ``[B, 3, H, W]``."""
        x, grid_hw = self.embed_patches(image), self.grid_hw((image.shape[2], image.shape[3]))
        *blocks, last = cast("list[ResidualBlock]", self.transformer.resblocks)
        kept = []
        for index, block in enumerate(blocks):
            x = block(x)
            if index in self.taps:
                kept.append(x[:, 1:].transpose(1, 2).unflatten(2, grid_hw))
        return DenseFeatures(self.project(dense_block(last, x)), (kept[0], kept[1]))


def dense_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """The last block, ``[B, 1 + N, W]`` to the same."""
    bias = block.attn.in_proj_bias.chunk(3)[2]
    value = F.linear(block.ln_1(x), block.attn.in_proj_weight.chunk(3)[2], bias)
    x = block.attn.out_proj(value) + x[:, :1]
    return cast(Tensor, x + block.mlp(block.ln_2(x)))
