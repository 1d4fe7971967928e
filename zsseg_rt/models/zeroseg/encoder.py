"""ZeroSeg's student encoder and reconstruction head: those of MAE, with MAE's key names.

Source:
    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.models.clip.towers import attend, resize_positional_embedding

NORM_EPS = 1e-6  # MAE's, for every LayerNorm


def sincos_positions(width: int, grid_side: int) -> Tensor:
    """MAE's fixed sines and cosines of column, then row, float32 ``[1, 1 + grid_side**2, W]``."""
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    side = torch.arange(grid_side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([side.sin(), side.cos()], dim=1)
    columns = axis.repeat(grid_side, 1)
    rows = axis.repeat_interleave(grid_side, dim=0)
    table = torch.cat([columns, rows], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


class PatchMask(NamedTuple):
    """Which patches of each image the encoder sees."""

    kept: Tensor  # Indices of the visible patches in the order they are encoded, int64 [B, K]
    removed: Tensor  # 1 where a patch is hidden, 0 where it is visible, float32 [B, N]
    restore: Tensor  # Place of every patch among visible then hidden ones, int64 [B, N]


def random_patch_mask(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> PatchMask:
    """Hide random patches of each image; ``int(num_patches * (1 - mask_ratio))`` stay visible."""
    num_kept = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if num_kept < 1:
        raise ArgumentError(
            f"mask_ratio: expected a share in [0, 1) that leaves one of {num_patches} patches, "
            f"got {mask_ratio}. MAE hides 0.75, ZeroSeg 0.6."
        )
    noise = torch.rand(batch, num_patches, device=device, generator=generator)
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    removed = (restore >= num_kept).to(noise.dtype)
    return PatchMask(order[:, :num_kept], removed, restore)


class _Attention(nn.Module):
    """Multi-head self-attention with timm's names: ``qkv`` (rows q, k, v) and ``proj``."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.num_heads))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self, width: int, hidden_width: int, out_width: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, out_width or width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., out_width]``."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, W]`` to ``[B, N, W]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class MaskedTokens(NamedTuple):
    """The result of the student encoder."""

    cls_token: Tensor  # [B, W]
    patch_tokens: Tensor  # Visible patches, [B, K, W]; in raster order without a mask


class StudentEncoder(nn.Module):
    """MAE's encoder: a ViT with fixed positions that sees only some of the patches."""

    pos_embed: Tensor

    def __init__(
        self, *, width: int, num_layers: int, num_heads: int, patch_size: int, grid_side: int
    ) -> None:
        super().__init__()
        self.patch_size, self.grid_side = patch_size, grid_side
        self.patch_embed = _PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, grid_side))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image's patch grid; a remainder below one patch is ignored."""
        return size_hw[0] // self.patch_size, size_hw[1] // self.patch_size

    def positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """Positions of a grid, ``[1, 1 + N, W]``; bicubic for grids other than the stored one."""
        return resize_positional_embedding(self.pos_embed[0], grid_hw, mode="bicubic")[None]

    def forward(self, image: Tensor, mask: PatchMask | None = None) -> MaskedTokens:
        """Encode images, normalised RGB planes, float ``[B, 3, H, W]``."""
        _check_image(image, self.patch_size)
        positions = self.positions(self.grid_hw((image.shape[2], image.shape[3])))
        patches = self.patch_embed(image) + positions[:, 1:]
        if mask is not None:
            index = mask.kept[..., None].expand(-1, -1, patches.shape[2])
            patches = patches.gather(1, index)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return self.encode(torch.cat([cls_token, patches], dim=1))

    def encode(self, tokens: Tensor) -> MaskedTokens:
        """Run the blocks and the last norm on class token and patches ``[B, 1 + K, W]``."""
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return MaskedTokens(tokens[:, 0], tokens[:, 1:])


def _check_image(image: Tensor, patch_size: int) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < patch_size:
        raise ShapeError(
            f"image: expected [B, 3, H, W] of at least {patch_size}x{patch_size}, got "
            f"{list(image.shape)}. Resize it first."
        )
    if not image.is_floating_point():
        raise DTypeError(
            f"image: expected normalised floats, got {image.dtype}. Divide by 255 and normalise."
        )


class ReconstructionHead(nn.Module):
    """MAE's decoder: from the visible patches to the pixels of all patches. For training only."""

    decoder_pos_embed: Tensor

    def __init__(
        self,
        *,
        encoder_width: int,
        width: int,
        num_layers: int,
        num_heads: int,
        patch_size: int,
        grid_side: int,
    ) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_positions(width, grid_side))
        self.decoder_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens: MaskedTokens, mask: PatchMask) -> Tensor:
        """Pixels of every patch, ``[B, N, 3 * patch_size ** 2]``, as :func:`patchify` does."""
        cls_token = self.decoder_embed(tokens.cls_token)[:, None]
        visible = self.decoder_embed(tokens.patch_tokens)
        batch, num_patches = mask.restore.shape
        hidden = self.mask_token.to(visible).expand(batch, num_patches - visible.shape[1], -1)
        index = mask.restore[..., None].expand(-1, -1, visible.shape[2])
        patches = torch.cat([visible, hidden], dim=1).gather(1, index)
        x = torch.cat([cls_token, patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # type: ignore[no-any-return]


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut images ``[B, 3, H, W]`` into patches ``[B, N, p * p * 3]``: row, column, channel."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    cells = image.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def reconstruction_loss(
    pixels: Tensor, image: Tensor, mask: PatchMask, *, patch_size: int, norm_pix_loss: bool = False
) -> Tensor:
    """Mean squared error of the hidden patches, laid out as :func:`patchify` does; 0 if none is."""
    target = patchify(image, patch_size)
    if norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    errors = (pixels.float() - target.float()).square().mean(dim=-1)
    return (errors * mask.removed).sum() / mask.removed.sum().clamp(min=1.0)
