"""CLIP's image tower with a dense head, for one input size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsseg_rt.export.folded.clip import FoldedBlock, linear_from
from zsseg_rt.models.clip.image_encoder import unit
from zsseg_rt.models.clip.transformer import ResidualBlock, merge_heads, split_heads
from zsseg_rt.models.dense.dense_clip import DenseCLIP
from zsseg_rt.models.dense.encoder import DenseImageEncoder, attend_by_rule
from zsseg_rt.models.input_checks import check_size


def fold_dense(model: DenseCLIP, size_hw: tuple[int, int] | None = None) -> FoldedDenseEncoder:
    """Build the image encoder that is exported; ``size_hw`` None is the model's."""
    return FoldedDenseEncoder(model.image_encoder, size_hw or model.config.size_hw)


class _FoldedDenseBlock(nn.Module):
    """The last block for one grid: only the projections a head reads, only patches out.

    MaskCLIP's attention is the identity, so its two projections are merged into one.
    """

    prior: Tensor | None

    def __init__(self, encoder: DenseImageEncoder, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        block, attention = encoder.last_block, encoder.last_block.attn
        self.rule, self.num_heads = encoder.rule, attention.num_heads
        kept = ["qkv".index(name) for name in self.rule.reads]
        weight = torch.cat([attention.in_proj_weight.chunk(3)[index] for index in kept])
        bias = torch.cat([attention.in_proj_bias.chunk(3)[index] for index in kept])
        self.out_proj: nn.Module = attention.out_proj
        if not self.rule.products:
            bias = attention.out_proj.bias + attention.out_proj.weight @ bias
            weight = attention.out_proj.weight @ weight
            self.out_proj = nn.Identity()
        weights, biases = weight.chunk(len(kept)), bias.chunk(len(kept))
        self.projections = nn.ModuleList(map(linear_from, weights, biases))
        self.register_buffer("prior", encoder.prior(grid_hw))
        self.ln_1 = block.ln_1
        if self.rule.residual:
            self.ln_2, self.mlp = block.ln_2, block.mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, 1 + N, W]`` to patches ``[B, N, W]``."""
        dense = self.out_proj(self._mix(self.ln_1(tokens))[:, 1:])
        if not self.rule.residual:
            return dense  # type: ignore[no-any-return]
        dense = tokens[:, 1:] + dense
        return dense + self.mlp(self.ln_2(dense))  # type: ignore[no-any-return]

    def _mix(self, x: Tensor) -> Tensor:
        projected: list[Tensor] = [project(x) for project in self.projections]
        if not self.rule.products:
            return projected[0]
        parts = {
            name: split_heads(part, self.num_heads)
            for name, part in zip(self.rule.reads, projected, strict=True)
        }
        return merge_heads(attend_by_rule(self.rule, parts, self.prior))


def _folded(block: nn.Module) -> FoldedBlock:
    assert isinstance(block, ResidualBlock)
    return FoldedBlock(block, block.ln_1.weight.new_empty(0, block.attn.out_proj.in_features))


class FoldedDenseEncoder(nn.Module):
    """A :class:`DenseImageEncoder` for one input size, with everything constant precomputed.

    Equal to the encoder's patch embeddings up to rounding; there is no class embedding. No control
    flow depends on data.
    """

    cls_token: Tensor
    positions: Tensor

    def __init__(self, encoder: DenseImageEncoder, size_hw: tuple[int, int]) -> None:
        super().__init__()
        check_size(size_hw, encoder.config.patch_size)
        self.size_hw, self.grid_hw = size_hw, encoder.grid_hw(size_hw)
        self.conv1, self.ln_pre, self.ln_post = encoder.conv1, encoder.ln_pre, encoder.ln_post
        with torch.no_grad():
            self.blocks = nn.ModuleList(_folded(b) for b in encoder.transformer.resblocks[:-1])
            self.register_buffer("positions", encoder.patch_positions(self.grid_hw).clone())
            self.register_buffer("cls_token", encoder.ln_pre(encoder.class_token())[None, None])
            self.register_buffer("proj", encoder.patch_proj().detach())
            self.last_block = _FoldedDenseBlock(encoder, self.grid_hw)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Encode images of the fixed size.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, *size_hw]``.

        Returns:
            Patch embeddings ``[B, N, D]``, unit norm.
        """
        patches = self.ln_pre(self.conv1(image).flatten(2).transpose(1, 2) + self.positions)
        tokens = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return unit(self.ln_post(self.last_block(tokens)) @ self.proj)
