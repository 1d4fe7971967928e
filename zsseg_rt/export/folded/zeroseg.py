"""ZeroSeg for one input size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_size
from zsseg_rt.models.zeroseg.encoder import MaskedTokens
from zsseg_rt.models.zeroseg.model import SegmentTokens, ZeroSeg, segment_tokens


class FoldedZeroSeg(nn.Module):
    """A :class:`ZeroSeg` for one input size: positions are constants, training parts are gone."""

    cls_token: Tensor
    positions: Tensor

    def __init__(self, model: ZeroSeg, size_hw: tuple[int, int]) -> None:
        super().__init__()
        check_size(size_hw, model.config.patch_size)
        self.encoder, self.seg = model.encoder, model.seg
        self.size_hw, self.grid_hw = size_hw, model.encoder.grid_hw(size_hw)
        with torch.no_grad():
            positions = model.encoder.positions(self.grid_hw)
            self.register_buffer("positions", positions[:, 1:].clone())
            self.register_buffer("cls_token", model.encoder.cls_token + positions[:, :1])
        self.eval()

    def forward(self, image: Tensor) -> SegmentTokens:
        """Like :meth:`ZeroSeg.forward`, for images ``[B, 3, *size_hw]``."""
        patches = self.encoder.patch_embed(image) + self.positions
        cls_token = self.cls_token.expand(image.shape[0], -1, -1)
        tokens: MaskedTokens = self.encoder.encode(torch.cat([cls_token, patches], dim=1))
        return segment_tokens(self.seg(tokens.patch_tokens), self.grid_hw)
