"""CLIP's image tower, with or without deep visual prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.models.input_checks import check_tensor
from zsseg_rt.models.transformer import (
    Activation,
    Mlp,
    ResidualBlock,
    Transformer,
    merge_heads,
    split_heads,
)

__all__ = [
    "FoldedBlock",
    "FoldedImageEncoder",
    "ImageEmbeds",
    "ImageEncoder",
    "ImageEncoderConfig",
    "PromptedImageEncoder",
    "fold_norm",
    "linear_from",
    "resize_positional_embedding",
    "unit",
]

Interpolation = Literal["bilinear", "bicubic"]


def unit(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last axis, with no epsilon (as the official code does)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm


def resize_positional_embedding(
    positional_embedding: Tensor, grid_hw: tuple[int, int], mode: Interpolation = "bilinear"
) -> Tensor:
    """Resize a positional embedding to another patch grid.

    Row 0 (the class token) is kept; the rest is a square grid that is resized with
    ``align_corners=False`` and no antialiasing. The same grid gives back the input.

    Args:
        positional_embedding: float ``[1 + g * g, W]``.
        grid_hw: New grid, rows and columns.
        mode: How to interpolate.

    Returns:
        ``[1 + grid_hw[0] * grid_hw[1], W]``.
    """
    side = math.isqrt(positional_embedding.shape[0] - 1)
    if grid_hw == (side, side):
        return positional_embedding
    grid = torch.unflatten(positional_embedding[1:].T, 1, (side, side)).unsqueeze(0)
    resized = F.interpolate(grid, size=grid_hw, mode=mode, align_corners=False)
    return torch.cat([positional_embedding[:1], resized.flatten(2).squeeze(0).T])


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes of an image tower; the defaults are ZegCLIP's ViT-B/16.

    Attributes:
        width: Token width W.
        num_layers: Residual blocks.
        num_heads: Attention heads.
        mlp_width: Hidden width of the MLPs.
        embed_dim: Width D of the joint image-text space.
        patch_size: Side of a patch, in pixels.
        grid_side: Side of the square grid the positional embedding is stored for.
        activation: ``"quick_gelu"`` for OpenAI weights, ``"gelu"`` for most others.
        num_prompts: Visual prompts P a layer.
        num_deep_prompts: Layers after the first that replace the prompts by their own.
        prompt_dropout: Dropout on the projected prompts, in training.
        num_regions: Region tokens R of :class:`zsseg_rt.models.region_encoder.RegionImageEncoder`,
            a square number; 0 in other towers.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    embed_dim: int = 512
    patch_size: int = 16
    grid_side: int = 32
    activation: Activation = "quick_gelu"
    num_prompts: int = 10
    num_deep_prompts: int = 11
    prompt_dropout: float = 0.1
    num_regions: int = 0


class ImageEmbeds(NamedTuple):
    """What an image tower gives.

    Attributes:
        patch_embeds: ``[B, N, D]``, row-major over the grid, unit norm.
        cls_embed: ``[B, D]``, unit norm.
    """

    patch_embeds: Tensor
    cls_embed: Tensor


class ImageEncoder(nn.Module):
    """CLIP's ViT, every token projected into the joint space.

    Args:
        config: Sizes; what concerns prompts is not used.

    Attributes:
        position_mode: How the positional embedding is brought to another grid.
    """

    position_mode: ClassVar[Interpolation] = "bilinear"

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        rows = 1 + config.grid_side**2
        self.positional_embedding = nn.Parameter(scale * torch.randn(rows, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.num_layers, config.num_heads, config.mlp_width, config.activation
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid of a picture of ``size_hw`` pixels; a rest below one patch is cut off.

        Raises:
            ShapeError: The picture is smaller than one patch.
        """
        patch = self.config.patch_size
        if min(size_hw) < patch:
            raise ShapeError(
                f"image: expected at least {patch}x{patch} pixels, got {size_hw[0]}x{size_hw[1]}. "
                "Resize the picture first."
            )
        return size_hw[0] // patch, size_hw[1] // patch

    def class_token(self) -> Tensor:
        """What the class token is before ``ln_pre``, ``[W]``."""
        return self.class_embedding + self.positional_embedding[0]

    def patch_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """The patches' positional embedding for a grid, ``[N, W]``."""
        rows = resize_positional_embedding(self.positional_embedding, grid_hw, self.position_mode)
        return rows[1:]

    def input_tokens(self, image: Tensor) -> Tensor:
        """Class and patch tokens with their positions, before ``ln_pre``, ``[B, 1 + N, W]``."""
        check_tensor("image", image)
        if image.ndim != 4 or image.shape[1] != 3:
            raise ShapeError(
                f"image: expected [B, 3, H, W], got {list(image.shape)}. "
                "Give a batch of normalised RGB planes."
            )
        if image.dtype != self.conv1.weight.dtype:
            raise DTypeError(
                f"image: expected {self.conv1.weight.dtype}, got {image.dtype}. "
                "Normalise the picture and bring it to the model's dtype."
            )
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))
        positions = self.patch_positions(grid_hw)
        patches = self.conv1(image).flatten(2).transpose(1, 2) + positions
        cls_token = self.class_token().expand(image.shape[0], 1, -1)
        return torch.cat([cls_token, patches], dim=1)

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class and patch tokens after ``ln_pre``, ``[B, 1 + N, W]``."""
        return self.ln_pre(self.input_tokens(image))  # type: ignore[no-any-return]

    def project(self, tokens: Tensor) -> Tensor:
        """Bring tokens ``[B, N, W]`` into the joint space, ``[B, N, D]``, not normalised."""
        return self.ln_post(tokens) @ self.proj  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode pictures.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            Unit-norm patch and class embeddings.

        Raises:
            ShapeError: The image has another layout or is smaller than one patch.
            DTypeError: The image is not of the weights' dtype.
        """
        embeds = self.project(self.transformer(self.embed_patches(image)))
        return ImageEmbeds(unit(embeds[:, 1:]), unit(embeds[:, 0]))


class PromptedImageEncoder(ImageEncoder):
    """The image tower with deep visual prompts that ZegCLIP trains.

    Every layer sees P prompt tokens of its own between the class token and the patches; what a
    layer makes of them is thrown away. Differences from plain CLIP besides the prompts: the class
    embedding is added twice, and a trainable LayerNorm precedes ``ln_post``.

    Args:
        config: Sizes.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023; Jia et al., "Visual Prompt Tuning", ECCV 2022.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        width, count = config.width, config.num_prompts
        bound = math.sqrt(6.0 / (3 * config.patch_size**2 + width))
        shallow = torch.empty(1, count, width).uniform_(-bound, bound)
        deep = torch.empty(config.num_deep_prompts, count, width).uniform_(-bound, bound)
        self.prompt_embeddings = nn.Parameter(shallow)
        self.deep_prompt_embeddings = nn.Parameter(deep)
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)

    def class_token(self) -> Tensor:
        """What the class token is before ``ln_pre``, ``[W]``; the class embedding counts twice."""
        return super().class_token() + self.class_embedding

    def projected_prompts(self) -> Tensor:
        """The prompts of each layer that has any, ``[1 + num_deep_prompts, P, W]``."""
        prompts = torch.cat([self.prompt_embeddings, self.deep_prompt_embeddings])
        return self.prompt_proj(prompts)  # type: ignore[no-any-return]

    def layer_prompts(self) -> Iterator[tuple[ResidualBlock, Tensor]]:
        """Each block with its prompts ``[P, W]``; blocks beyond the last set get ``[0, W]``."""
        prompts = self.projected_prompts()
        for index, block in enumerate(self.transformer.resblocks):
            assert isinstance(block, ResidualBlock)
            yield block, prompts[index] if index < len(prompts) else prompts[0, :0]

    def run_blocks(
        self, tokens: Tensor, mask_of: Callable[[int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run every block with its prompts between the class token and the others.

        Args:
            tokens: Class token and K others after ``ln_pre``, ``[B, 1 + K, W]``.
            mask_of: Gives the attention mask of a block with so many prompts; None masks nothing.

        Returns:
            What the last block gives, as the class token ``[B, 1, W]``, its prompts and the K
            others.
        """
        cls_token, others = tokens[:, :1], tokens[:, 1:]
        sizes = [1, 0, others.shape[1]]
        prompts = others[:, :0]
        for block, layer_prompts in self.layer_prompts():
            prompts = layer_prompts.expand(tokens.shape[0], -1, -1)
            prompts = F.dropout(prompts, self.config.prompt_dropout, self.training)
            sizes[1] = prompts.shape[1]
            mask = mask_of(sizes[1]) if mask_of else None
            tokens = block(torch.cat([cls_token, prompts, others], dim=1), mask=mask)
            cls_token, prompts, others = torch.split(tokens, sizes, dim=1)
        return cls_token, prompts, others

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode pictures; see :meth:`ImageEncoder.forward`."""
        tokens = torch.cat(self.run_blocks(self.embed_patches(image)), dim=1)
        embeds = self.project(self.prompt_norm(tokens))
        num_patches = math.prod(self.grid_hw((image.shape[2], image.shape[3])))
        return ImageEmbeds(unit(embeds[:, -num_patches:]), unit(embeds[:, 0]))


def fold_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[nn.LayerNorm, nn.Linear]:
    """Two layers that together give ``weight @ norm(x) + bias``, made for inference.

    Scale and shift of the norm go into the projection, unless float16 holds its weight exactly, as
    it does CLIP's own: then the norm keeps them and the file stores the weight in half the bytes.
    """
    if torch.equal(weight.half().float(), weight.float()):
        return norm, linear_from(weight, bias)
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    return plain, linear_from(weight * norm.weight, bias + weight @ norm.bias)


class FoldedBlock(nn.Module):
    """A residual block whose prompts are constant keys and values.

    Only class and patch tokens flow through; see :func:`fold_norm` for the norms.
    """

    prompt_keys: Tensor
    prompt_values: Tensor

    def __init__(self, block: ResidualBlock, prompts: Tensor) -> None:
        super().__init__()
        width = prompts.shape[-1]
        self.num_heads = block.attn.num_heads
        self.norm_1, self.qkv = fold_norm(
            block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias
        )
        self.out_proj = block.attn.out_proj
        self.mlp = Mlp(width, block.mlp.c_fc.out_features, block.mlp.activation)
        self.norm_2, self.mlp.c_fc = fold_norm(
            block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias
        )
        self.mlp.c_proj = block.mlp.c_proj
        _, keys, values = self.qkv(self.norm_1(prompts)).unsqueeze(0).chunk(3, dim=-1)
        self.register_buffer("prompt_keys", split_heads(keys, self.num_heads).contiguous())
        self.register_buffer("prompt_values", split_heads(values, self.num_heads).contiguous())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ``[B, N, W]`` to ``[B, N, W]``; ``mask`` ``[N, N + P]`` is added to the scores."""
        q, k, v = (split_heads(part, self.num_heads) for part in self._qkv(x))
        if self.prompt_keys.shape[2]:
            k = torch.cat([k, self.prompt_keys.expand(x.shape[0], -1, -1, -1)], dim=2)
            v = torch.cat([v, self.prompt_values.expand(x.shape[0], -1, -1, -1)], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out_proj(merge_heads(attended))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm_1(x)).chunk(3, dim=-1)  # type: ignore[no-any-return]


def linear_from(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen linear layer of given tensors, detached and not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


class FoldedImageEncoder(nn.Module):
    """A :class:`PromptedImageEncoder` for one input size, with everything constant precomputed.

    Equal to the encoder up to rounding: prompts are constant keys and values of each block (what
    blocks make of prompts is never used), the class token starts as a constant, the positional
    embedding is already resized, norms are folded into the projections behind them (see
    :func:`fold_norm`). No control flow depends on data. Evaluation only: it has no dropout.

    Args:
        encoder: The encoder to fold; large unchanged weights are shared with it, not copied.
        size_hw: Picture size in pixels.
    """

    cls_token: Tensor
    positions: Tensor

    def __init__(self, encoder: PromptedImageEncoder, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.size_hw = size_hw
        self.grid_hw = encoder.grid_hw(size_hw)
        with torch.no_grad():
            self._fold(encoder)
        self.eval()

    def _fold(self, encoder: PromptedImageEncoder) -> None:
        positions = resize_positional_embedding(encoder.positional_embedding, self.grid_hw)[1:]
        self.conv1 = encoder.conv1
        self.ln_pre = encoder.ln_pre
        self.register_buffer("positions", positions.clone())
        self.register_buffer("cls_token", encoder.ln_pre(encoder.class_token())[None, None])
        self.blocks = nn.ModuleList(FoldedBlock(*pair) for pair in encoder.layer_prompts())
        self.prompt_norm = encoder.prompt_norm
        no_bias = torch.zeros(encoder.config.embed_dim, device=positions.device)
        self.norm_post, self.proj = fold_norm(encoder.ln_post, encoder.proj.T, no_bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures of the one size.

        Args:
            image: Normalised RGB planes, float ``[B, 3, *size_hw]``.

        Returns:
            ``patch_embeds`` ``[B, N, D]`` and ``cls_embed`` ``[B, D]``, both unit norm.
        """
        tokens = self.embed_patches(image)
        for block in self.blocks:
            tokens = block(tokens)
        embeds = self.project(self.prompt_norm(tokens))
        return embeds[:, 1:], embeds[:, 0]

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class and patch tokens before the first block, ``[B, 1 + N, W]``."""
        patches = self.ln_pre(self.conv1(image).flatten(2).transpose(1, 2) + self.positions)
        return torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1)

    def project(self, tokens: Tensor) -> Tensor:
        """Bring tokens ``[B, N, W]`` into the joint space, ``[B, N, D]``, unit norm."""
        return unit(self.proj(self.norm_post(tokens)))
