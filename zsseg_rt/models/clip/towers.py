"""CLIP's two towers, with the published names; the image tower also with deep visual prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.models.functional import check_tensor

Activation = Literal["quick_gelu", "gelu", "relu"]
"""Of MLPs; ``"relu"`` is the text tower's of TIPS."""


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention of ``[..., N, W]`` to ``[..., M, W]``; a mask may have heads."""
    q, k, v = (
        torch.unflatten(part, -1, (num_heads, -1)).transpose(-2, -3)
        for part in (queries, keys, values)
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(-2, -3).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection (rows q, k, v)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``[B, N, W]``; a mask ``[N, N]`` or more is added to the scores."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.num_heads, mask=mask))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """``c_proj(activation(c_fc(x)))``."""

    def __init__(self, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, hidden_width)
        self.c_proj = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        quick = self.activation == "quick_gelu"
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        return self.c_proj(hidden)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Pre-norm block: ``x += attn(ln_1(x)); x += mlp(ln_2(x))``."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, activation)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A stack of :class:`ResidualBlock`, named ``resblocks`` as in the checkpoints."""

    def __init__(self, config: ImageEncoderConfig | TextEncoderConfig) -> None:
        super().__init__()
        sizes = config.width, config.num_heads, config.mlp_width, config.activation
        self.resblocks = nn.ModuleList(ResidualBlock(*sizes) for _ in range(config.num_layers))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Run every block on ``x`` ``[B, N, W]``."""
        for block in self.resblocks:
            x = block(x, mask=mask)
        return x


Interpolation = Literal["bilinear", "bicubic"]


def unit(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last axis, with no epsilon (as the official code does)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm


def resize_positional_embedding(
    positional_embedding: Tensor,
    grid_hw: tuple[int, int],
    mode: Interpolation = "bilinear",
) -> Tensor:
    """Resize a positional embedding ``[1 + g * g, W]``, but for row 0, to another patch grid."""
    side = math.isqrt(positional_embedding.shape[0] - 1)
    if grid_hw == (side, side):
        return positional_embedding
    grid = torch.unflatten(positional_embedding[1:].T, 1, (side, side)).unsqueeze(0)
    resized = F.interpolate(grid, size=grid_hw, mode=mode, align_corners=False)
    return torch.cat([positional_embedding[:1], resized.flatten(2).squeeze(0).T])


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes of an image tower; the defaults are ZegCLIP's ViT-B/16."""

    width: int = 768  # Token width W
    num_layers: int = 12  # Residual blocks
    num_heads: int = 12  # Attention heads
    mlp_width: int = 3072  # Hidden width of the MLPs
    embed_dim: int = 512  # Width D of the joint image-text space
    patch_size: int = 16  # Side of a patch, in pixels
    # Pixels from one patch to the next; None is patch_size. Half of it makes patches overlap, twice
    # as many along each side: a finer grid of patches that look as they did when CLIP was trained
    # (Amir et al., "Deep ViT Features as Dense Visual Descriptors", 2021)
    patch_stride: int | None = None
    grid_side: int = 32  # Side of the square grid the positional embedding is stored for
    activation: Activation = "quick_gelu"  # "quick_gelu" for OpenAI weights, "gelu" for most others
    num_prompts: int = 10  # Visual prompts P per layer
    num_deep_prompts: int = 11  # Layers after the first that replace the prompts with their own
    prompt_dropout: float = 0.1  # Dropout on the projected prompts, in training
    num_cells: int = 0  # Cell tokens R of CLIP-RC's tower, a square number; 0 in other towers

    def __post_init__(self) -> None:
        patch = self.patch_size
        possible = [n for n in range(1, patch + 1) if patch % n == 0 and (patch - n) % 2 == 0]
        if self.stride not in possible:
            raise ShapeError(
                f"patch_stride: expected one of {', '.join(map(str, possible))} for patches of "
                f"{patch} pixels, got {self.stride}. Choose another."
            )

    @property
    def stride(self) -> int:
        return self.patch_size if self.patch_stride is None else self.patch_stride

    @property
    def side(self) -> int:
        """Side in pixels of the image that the positional embedding is stored for."""
        return self.grid_side * self.stride


class ImageEmbeds(NamedTuple):
    """The result of an image tower."""

    patch_embeds: Tensor  # [B, N, D], row-major over the grid, unit norm
    cls_embed: Tensor  # [B, D], unit norm
    # Of CLIP-RC's tower: [B, R, D], row-major over the square grid of cells, unit norm
    cell_embeds: Tensor | None = None


class ImageEncoder(nn.Module):
    """CLIP's ViT, every token projected into the joint space."""

    position_mode: ClassVar[Interpolation] = "bilinear"  # For grids of other sizes

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, stride = config.width, config.patch_size, config.stride
        scale = width**-0.5
        self.conv1 = nn.Conv2d(
            3, width, kernel_size=patch, stride=stride, padding=(patch - stride) // 2, bias=False
        )
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        rows = 1 + config.grid_side**2
        self.positional_embedding = nn.Parameter(scale * torch.randn(rows, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid of an image of ``size_hw`` pixels; a remainder below a step is cut off."""
        patch = self.config.patch_size
        if min(size_hw) < patch:
            raise ShapeError(
                f"image: expected at least {patch}x{patch} pixels, got {size_hw[0]}x{size_hw[1]}. "
                "Resize the image first."
            )
        return size_hw[0] // self.config.stride, size_hw[1] // self.config.stride

    def class_token(self) -> Tensor:
        """The class token before ``ln_pre``, ``[W]``."""
        return self.class_embedding + self.positional_embedding[0]

    def patch_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """The patches' positional embedding for a grid, ``[N, W]``."""
        rows = resize_positional_embedding(self.positional_embedding, grid_hw, self.position_mode)
        return rows[1:]

    def check_image(self, image: Tensor) -> None:
        """Refuse what are no images of the model's dtype, and too small ones."""
        check_tensor("image", image)
        if image.ndim != 4 or image.shape[1] != 3:
            raise ShapeError(
                f"image: expected [B, 3, H, W], got {list(image.shape)}. "
                "Give a batch of normalised RGB planes."
            )
        if image.dtype != self.conv1.weight.dtype:
            raise DTypeError(
                f"image: expected {self.conv1.weight.dtype}, got {image.dtype}. "
                "Normalise the image and convert it to the model's dtype."
            )
        self.grid_hw((image.shape[2], image.shape[3]))

    def input_tokens(self, image: Tensor) -> Tensor:
        """Class and patch tokens with their positions, before ``ln_pre``, ``[B, 1 + N, W]``."""
        self.check_image(image)
        positions = self.patch_positions(self.grid_hw((image.shape[2], image.shape[3])))
        patches = self.conv1(image).flatten(2).transpose(1, 2) + positions
        cls_token = self.class_token().expand(image.shape[0], 1, -1)
        return torch.cat([cls_token, patches], dim=1)

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class and patch tokens after ``ln_pre``, ``[B, 1 + N, W]``."""
        return self.ln_pre(self.input_tokens(image))  # type: ignore[no-any-return]

    def project(self, tokens: Tensor) -> Tensor:
        """Project tokens ``[B, N, W]`` into the joint space, ``[B, N, D]``, not normalised."""
        return self.ln_post(tokens) @ self.proj  # type: ignore[no-any-return]

    def encode_image(self, image: Tensor) -> Tensor:
        """Embed images ``[B, 3, H, W]`` as CLIP does, ``[B, D]``, not normalised."""
        return self.project(self.transformer(self.embed_patches(image))[:, 0])

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode images, normalised RGB planes, float ``[B, 3, H, W]``."""
        embeds = self.project(self.transformer(self.embed_patches(image)))
        return ImageEmbeds(unit(embeds[:, 1:]), unit(embeds[:, 0]))


class PromptedImageEncoder(ImageEncoder):
    """The image tower with deep visual prompts that ZegCLIP trains.

    Every layer sees prompt tokens of its own between the class token and the patches. Besides, the
    class embedding is added twice, and a trainable LayerNorm precedes ``ln_post``.

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
        """The class token before ``ln_pre``, ``[W]``; the class embedding counts twice."""
        return super().class_token() + self.class_embedding

    def run_blocks(
        self, tokens: Tensor, mask_of: Callable[[int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run blocks on ``[B, 1 + K, W]``; the class token, the last prompts, and the others."""
        sets = self.prompt_proj(torch.cat([self.prompt_embeddings, self.deep_prompt_embeddings]))
        cls_token, others = tokens[:, :1], tokens[:, 1:]
        sizes = [1, 0, others.shape[1]]
        prompts = others[:, :0]
        for index, block in enumerate(self.transformer.resblocks):
            prompts = sets[index] if index < len(sets) else sets[0, :0]
            prompts = prompts.expand(tokens.shape[0], -1, -1)
            prompts = F.dropout(prompts, self.config.prompt_dropout, self.training)
            sizes[1] = prompts.shape[1]
            mask = mask_of(sizes[1]) if mask_of else None
            tokens = block(torch.cat([cls_token, prompts, others], dim=1), mask=mask)
            cls_token, prompts, others = torch.split(tokens, sizes, dim=1)
        return cls_token, prompts, others

    def forward(self, image: Tensor) -> ImageEmbeds:
        tokens = torch.cat(self.run_blocks(self.embed_patches(image)), dim=1)
        embeds = self.project(self.prompt_norm(tokens))
        num_patches = math.prod(self.grid_hw((image.shape[2], image.shape[3])))
        return ImageEmbeds(unit(embeds[:, -num_patches:]), unit(embeds[:, 0]))


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of a text tower; the defaults are CLIP ViT-B/16's."""

    vocab_size: int = 49408  # Token ids run from 0 to vocab_size - 1
    context_length: int = 77  # Tokens per prompt
    width: int = 512  # Token width W
    num_layers: int = 12  # Residual blocks
    num_heads: int = 8  # Attention heads
    mlp_width: int = 2048  # Hidden width of the MLPs
    embed_dim: int = 512  # Width D of the joint image-text space
    activation: Activation = "quick_gelu"  # "quick_gelu" for OpenAI weights, "gelu" for most others
    # What class names may be made of, for a tower that was trained on few words; empty: anything
    words: tuple[str, ...] = ()
    prompt_words: tuple[str, ...] = ()  # Further words and punctuation that such a tower knows


class TextEncoder(nn.Module):
    """Causal transformer over token ids; the feature at the end-of-text token is projected."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed prompts, ``[T, D]``, **not** normalised.

        ``tokens`` are ids, int64 ``[T, context_length]``, padded with 0; the end-of-text token must
        be the row's largest id, as with CLIP's tokenizer.
        """
        length = self.config.context_length
        if tokens.ndim != 2 or tokens.shape[1] != length:
            raise ShapeError(
                f"tokens: expected [T, {length}], got {list(tokens.shape)}. "
                "Tokenize with this text encoder's context length."
            )
        if tokens.is_floating_point():
            raise DTypeError(f"tokens: expected integer ids, got {tokens.dtype}. Convert to int64.")
        return self.embed(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """:meth:`forward` for rows that are cut behind the end-of-text token."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        future = columns > columns.unsqueeze(1)
        mask = torch.zeros_like(future, dtype=x.dtype).masked_fill(future, float("-inf"))
        x = cast(Tensor, self.ln_final(self.transformer(x, mask=mask)))
        ends = tokens.argmax(dim=-1)
        return x[torch.arange(len(x), device=x.device), ends] @ self.text_projection


def average_templates(text_embeds: Tensor) -> Tensor:
    """One unit vector per class ``[..., D]`` of those under T templates ``[..., T, D]``."""
    return F.normalize(F.normalize(text_embeds, dim=-1).mean(dim=-2), dim=-1)
