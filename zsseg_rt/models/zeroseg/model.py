"""ZeroSeg: an MAE student that learns segments from CLIP's image encoder alone.

Nothing official can be loaded: neither code nor weights were published.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023, for the layer counts; Xu et al., "GroupViT: Semantic
    Segmentation Emerges from Text Supervision", CVPR 2022, for grouping and the class rule; He et
    al., "Masked Autoencoders Are Scalable Vision Learners" (MAE), CVPR 2022, for encoder and
    reconstruction head, with MAE's key names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common.checks import check_range, check_size
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models.base import (
    LONGEST_SIDE,
    SegmentationModel,
    SlideSettings,
    input_image,
    score_windows,
)
from zsseg_rt.models.clip.towers import TextEncoder, attend, resize_positional_embedding
from zsseg_rt.models.clip.weights import ClipSource, build_text_encoder, load_into
from zsseg_rt.models.functional import check_text_embeds, shared_fields
from zsseg_rt.torch_files.checkpoints import check_float32, load_checkpoint, load_weights
from zsseg_rt.torch_files.shapes import Checked, divisor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --- MAE's encoder and reconstruction head ---

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
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _blocks(count: int, width: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, num_heads) for _ in range(count)))


class MaskedTokens(NamedTuple):
    """The result of the student encoder."""

    cls_token: Tensor  # [B, W]
    patch_tokens: Tensor  # Visible patches, [B, K, W]; in raster order without a mask


class StudentEncoder(nn.Module):
    """MAE's encoder: a ViT with fixed positions that sees only some of the patches."""

    pos_embed: Tensor

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        width, self.patch_size = config.width, config.patch_size
        conv = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, config.grid_side))
        self.blocks = _blocks(config.num_layers, width, config.num_heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image's patch grid; a remainder below one patch is ignored."""
        return size_hw[0] // self.patch_size, size_hw[1] // self.patch_size

    def forward(self, image: Tensor, mask: PatchMask | None = None) -> MaskedTokens:
        """Encode images, normalised RGB planes, float ``[B, 3, H, W]``."""
        _check_image(image, self.patch_size)
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))
        positions = resize_positional_embedding(self.pos_embed[0], grid_hw, mode="bicubic")[None]
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2) + positions[:, 1:]
        if mask is not None:
            index = mask.kept[..., None].expand(-1, -1, patches.shape[2])
            patches = patches.gather(1, index)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([cls_token, patches], dim=1)))
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

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_positions(width, config.grid_side))
        self.decoder_blocks = _blocks(config.decoder_layers, width, config.decoder_heads)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, 3 * config.patch_size**2)

    def forward(self, tokens: MaskedTokens, mask: PatchMask) -> Tensor:
        """Pixels of every patch, ``[B, N, 3 * patch_size ** 2]``, as :func:`patchify` does."""
        cls_token = self.decoder_embed(tokens.cls_token)[:, None]
        visible = self.decoder_embed(tokens.patch_tokens)
        batch, num_patches = mask.restore.shape
        hidden = self.mask_token.to(visible).expand(batch, num_patches - visible.shape[1], -1)
        index = mask.restore[..., None].expand(-1, -1, visible.shape[2])
        patches = torch.cat([visible, hidden], dim=1).gather(1, index)
        x = torch.cat([cls_token, patches], dim=1) + self.decoder_pos_embed
        x = self.decoder_blocks(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # type: ignore[no-any-return]


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut images ``[B, 3, H, W]`` into patches ``[B, N, p * p * 3]``: row, column, channel."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    cells = image.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def reconstruction_loss(
    pixels: Tensor, image: Tensor, mask: PatchMask, *, patch_size: int
) -> Tensor:
    """Mean squared error of the hidden patches, laid out as :func:`patchify` does; 0 if none is."""
    target = patchify(image, patch_size)
    errors = (pixels.float() - target.float()).square().mean(dim=-1)
    return (errors * mask.removed).sum() / mask.removed.sum().clamp(min=1.0)


# --- segments ---


def spread_scores(
    scores: Tensor, segments: Tensor, background_threshold: float | None = None
) -> Tensor:
    """Scores ``[B, G, C]`` by the pixels' segments ``[B, H, W]``, ``[B, C, H, W]``.

    With a background, which then is the first of ``1 + C`` channels, a segment whose best class is
    below ``min(background_threshold, best score of all segments)`` is background.
    So the best segment never is.
    """
    if background_threshold is not None:
        best = scores.amax(dim=2, keepdim=True)
        limit = best.amax(dim=1, keepdim=True).clamp(max=background_threshold)
        scores = torch.cat([(best < limit).to(scores), scores], dim=2)
    index = segments.flatten(1)[..., None].expand(-1, -1, scores.shape[2])
    spread = scores.gather(1, index).transpose(1, 2)
    return torch.unflatten(spread, 2, segments.shape[1:])


ZEROSEG_TEMPLATES = ("a photo of a {}.",)
"""GroupViT's "simple" prompt, which is the paper's example."""


@dataclass(frozen=True, kw_only=True)
class ZeroSegConfig:
    """Everything that defines a ZeroSeg model besides its weights; by default the paper's."""

    width: int = 768  # Token width of the encoder
    num_layers: int = 12  # Blocks of the encoder
    num_heads: int = 12  # Attention heads of the encoder
    patch_size: int = 16  # Side of a patch, in pixels
    grid_side: int = 14  # Side of the patch grid in training: 14 for 224 pixels
    decoder_width: int = 512  # Token width of the reconstruction head
    decoder_layers: int = 8  # Blocks of the reconstruction head; 0 for a model without one
    decoder_heads: int = 16  # Attention heads of the reconstruction head
    head_heads: int = 12  # Attention heads of the segmentation head. Not in the paper
    # Blocks before the first grouping, before the second, and after it. The paper says five and
    # where the groupings are; that the fifth is the block that "encodes all segment tokens" is
    # inferred
    head_layers: tuple[int, int, int] = (2, 2, 1)
    group_tokens: tuple[int, int] = (32, 8)  # Numbers of groups in the two groupings
    embed_dim: int = 768  # Width D of the teacher's joint space
    logit_scale: float = 100.0  # Multiplies cosines before the softmax; GroupViT's
    # Number of classes kept: those nearest to the whole image; GroupViT's. None keeps all
    top_k: int | None = 5
    # Score below which a bundle's pixels are unknown. None keeps all
    background_threshold: float | None = None
    # Input size in pixels that a bundle is built for; the model itself takes any size
    size_hw: tuple[int, int] = (448, 448)
    templates: tuple[str, ...] = ZEROSEG_TEMPLATES  # Prompts with one {} each

    def __post_init__(self) -> None:
        for heads, width in (
            ("num_heads", "width"),
            ("head_heads", "width"),
            ("decoder_heads", "decoder_width"),
        ):
            if getattr(self, heads) < 1 or getattr(self, width) % getattr(self, heads):
                raise ArgumentError(
                    f"{heads}: expected a divisor of {width} {getattr(self, width)}, got "
                    f"{getattr(self, heads)}. Change one of them."
                )
        if self.width % 4 or self.decoder_width % 4:
            raise ArgumentError(
                f"width: expected multiples of 4 for the sine-cosine positions, got {self.width} "
                f"and decoder_width {self.decoder_width}. Use multiples of 4."
            )
        if len(self.head_layers) != 3 or len(self.group_tokens) != 2 or min(self.group_tokens) < 1:
            raise ArgumentError(
                f"head_layers: expected three counts, and two positive counts in group_tokens, got "
                f"{self.head_layers} and {self.group_tokens}. The defaults are (2, 2, 1), (32, 8)."
            )
        if not 0 < self.logit_scale < float("inf"):
            raise ArgumentError(
                f"logit_scale: expected a number above 0, got {self.logit_scale}. "
                "GroupViT and CLIP use 100."
            )
        check_range(self, "top_k", least=1)
        check_range(self, "background_threshold", most=1)
        check_size(self.size_hw, self.patch_size)


def hard_assignment(logits: Tensor, *, noisy: bool) -> Tensor:
    """One 1 per column of ``[B, S, L]``, its group; with the gradient of a softmax."""
    if noisy:
        return F.gumbel_softmax(logits, hard=True, dim=1)
    groups = torch.arange(logits.shape[1], device=logits.device)[:, None]
    one_hot = (logits.argmax(dim=1, keepdim=True) == groups).to(logits.dtype)
    if not torch.is_grad_enabled():
        return one_hot
    soft = logits.softmax(dim=1)
    return one_hot - soft.detach() + soft


class _Projections(nn.Module):
    """The four projections of an attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)


class _CrossAttention(_Projections):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width)
        self.num_heads = num_heads

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q_proj(query), self.k_proj(memory), self.v_proj(memory)
        return self.proj(attend(q, k, v, self.num_heads))  # type: ignore[no-any-return]


class _CrossBlock(nn.Module):
    """Group tokens attend to the inputs; the norm comes at the end, not before."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = _CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)
        self.norm_post = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        query = query + self.attn(query, memory)
        query = query + self.mlp(self.norm2(query))
        return self.norm_post(query)  # type: ignore[no-any-return]


class _Assign(_Projections):
    """Assign the inputs to groups: their mean values, and soft shares ``[B, S, L]``."""

    def forward(self, groups: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.k_proj(inputs).transpose(1, 2)
        logits = ((self.q_proj(groups) @ keys) * groups.shape[2] ** -0.5).float()
        hard = hard_assignment(logits, noisy=self.training)
        shares = hard / (hard.sum(dim=2, keepdim=True) + 1.0)
        gathered = self.proj(shares.to(inputs.dtype) @ self.v_proj(inputs))
        return gathered, logits.softmax(dim=1)


class _TokenMlp(Mlp):
    """A GELU MLP over the token axis: ``[B, S, C]`` to ``[B, S', C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GroupingBlock(nn.Module):
    """GroupViT's grouping block: inputs ``[B, L, C]`` become segments ``[B, S, C]``."""

    def __init__(self, config: ZeroSegConfig, num_groups: int) -> None:
        super().__init__()
        width = config.width
        self.norm_tokens = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_inter = _TokenMlp(num_groups, width // 2)
        self.norm_post_tokens = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_x = nn.LayerNorm(width, eps=NORM_EPS)
        self.pre_assign_attn = _CrossBlock(width, config.head_heads)
        self.assign = _Assign(width)
        self.norm_new_x = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_channels = Mlp(width, 4 * width)

    def forward(self, x: Tensor, group_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Group ``x`` ``[B, L, C]`` by ``group_tokens`` ``[B, S, C]``."""
        groups = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens)))
        x = self.norm_x(x)
        groups = self.pre_assign_attn(groups, x)
        gathered, shares = self.assign(groups, x)
        segments = gathered + groups
        return segments + self.mlp_channels(self.norm_new_x(segments)), shares


class _Stage(nn.Module):
    """Blocks over tokens and group tokens; all stages but the last end with a grouping."""

    def __init__(self, config: ZeroSegConfig, index: int) -> None:
        super().__init__()
        self.blocks = _blocks(config.head_layers[index], config.width, config.head_heads)


class _GroupingStage(_Stage):
    def __init__(self, config: ZeroSegConfig, index: int) -> None:
        super().__init__(config, index)
        width, count = config.width, config.group_tokens[index]
        self.grouping = GroupingBlock(config, count)
        self.group_token = nn.Parameter(torch.zeros(1, count, width))
        self.group_projector: nn.Module | None = None
        if index:  # from the previous stage's group tokens to this one's
            tokens = _TokenMlp(config.group_tokens[index - 1], width // 2, count)
            self.group_projector = nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS), tokens)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.group_token.expand(len(x), -1, -1)
        if self.group_projector is not None and before is not None:
            tokens = tokens + self.group_projector(before)
        joint = self.blocks(torch.cat([x, tokens], dim=1))
        x, tokens = joint[:, : x.shape[1]], joint[:, x.shape[1] :]
        segments, shares = self.grouping(x, tokens)
        return segments, tokens, shares


class SegmentationHead(nn.Module):
    """Two grouping stages, one more block over the segments, one projection for all."""

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        width = config.width
        groupings = [_GroupingStage(config, index) for index in range(2)]
        self.stages = nn.ModuleList([*groupings, _Stage(config, 2)])
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.proj = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, config.embed_dim)
        )

    def forward(self, patch_tokens: Tensor) -> SegmentTokens:
        """Group the encoder's visible patches ``[B, L, W]``; ``group_map`` is ``[B, G, L]``."""
        first, second, last = self.stages
        groups, tokens, first_shares = first(patch_tokens)
        segments, _, shares = second(groups, tokens)
        hidden = self.norm(cast(_Stage, last).blocks(segments))
        embeds, whole = self.proj(hidden), self.proj(hidden.mean(dim=1))
        return SegmentTokens(embeds, whole, shares @ first_shares)


class SegmentTokens(NamedTuple):
    """The segments of an image."""

    segment_embeds: Tensor  # [B, G, D], not normalised
    image_embed: Tensor  # [B, D], not normalised
    group_map: Tensor  # Soft share of every segment in every patch, [B, G, gh, gw]; sums to 1


class ZeroSeg(SegmentationModel):
    """Student encoder, segmentation head, and a reconstruction head for training, or None.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`. The
    text tower is the teacher's, if one was added; it is not trained.
    """

    architecture = "zeroseg"
    config: ZeroSegConfig

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self.encoder = StudentEncoder(config)
        self.decoder = ReconstructionHead(config) if config.decoder_layers else None
        self.seg = SegmentationHead(config)
        self.text_encoder: TextEncoder | None = None
        _initialise(self)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.config.size_hw

    @property
    def windows(self) -> SlideSettings:
        """GroupViT's: windows as large as the short side, in steps of half a window."""
        side = min(self.config.size_hw)
        return SlideSettings(short_side=side, crop_size=side, stride=side // 2)

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label every pixel by :meth:`segment`; see :meth:`SegmentationModel.label`."""
        image = input_image(self, rgb, text_embeds.device)
        return self.segment(image, text_embeds, (rgb.shape[0], rgb.shape[1]))[0][0]

    def slide(self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings) -> Tensor:
        """Label as GroupViT's evaluation, the long side at most 2048 pixels."""
        height, width = rgb.shape[:2]
        limit = max(1, LONGEST_SIDE * min(height, width) // max(height, width))
        windows = replace(windows, short_side=min(windows.short_side, limit))
        scores = score_windows(self, lambda window: self.predict(window, text_embeds), rgb, windows)
        background = self.config.background_threshold is not None  # which comes first
        return scores.argmax(dim=0) - int(background)

    def forward(self, image: Tensor) -> SegmentTokens:
        """Find the segments of images; in evaluation mode the result is deterministic.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A remainder below one patch at the right and the bottom is ignored.
        """
        tokens: SegmentTokens = self.seg(self.encoder(image).patch_tokens)
        grid_hw = self.encoder.grid_hw((image.shape[2], image.shape[3]))
        return tokens._replace(group_map=torch.unflatten(tokens.group_map, 2, grid_hw))

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Scores ``[B, C, H, W]`` in [0, 1] of every class at every pixel: those of its segment.

        With a configured ``background_threshold`` ``[B, 1 + C, H, W]``, the background first.
        """
        tokens = self(image)
        shares = F.interpolate(tokens.group_map, size=image.shape[2:], mode="bilinear")
        scores = self.class_scores(tokens, text_embeds)
        return spread_scores(scores, shares.argmax(dim=1), self.config.background_threshold)

    @torch.no_grad()
    def segment(
        self, image: Tensor, text_embeds: Tensor, out_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Label every pixel as the engine does: one pass over the whole image, any output size.

        Labels int64 ``[B, *out_hw]``, -1 for unknown, and each pixel's score. A segment that is
        background by the configured ``background_threshold`` is unknown.
        """
        tokens = self(image)
        best, classes = self.class_scores(tokens, text_embeds).max(dim=2)
        threshold = self.config.background_threshold
        if threshold is not None:
            limit = best.amax(dim=1, keepdim=True).clamp(max=threshold)
            classes = classes.masked_fill(best < limit, -1)
        maps = tokens.group_map.detach().float().cpu().numpy()
        winners = np.asarray(ops.upsample_argmax(maps, out_hw)[0], np.int64)
        segments = torch.from_numpy(winners).flatten(1).to(classes.device)
        labels, scores = classes.gather(1, segments), best.gather(1, segments)
        return torch.unflatten(labels, 1, out_hw), torch.unflatten(scores, 1, out_hw)

    def class_scores(self, tokens: SegmentTokens, text_embeds: Tensor) -> Tensor:
        """Scores ``[B, G, C]`` in [0, 1] of every class for every segment.

        With p the softmax over classes of ``logit_scale * cosine`` and q the same softmax over only
        the ``top_k`` classes nearest to the whole image, scores are ``p * q``.
        """
        segments, top_k = tokens.segment_embeds, self.config.top_k
        check_text_embeds(text_embeds, segments.shape[-1])
        text = F.normalize(text_embeds.to(segments), dim=-1)
        logits = self.config.logit_scale * (F.normalize(segments, dim=-1) @ text.T)
        scores = logits.softmax(dim=-1)
        if top_k is not None and top_k < len(text):
            overall = F.normalize(tokens.image_embed, dim=-1) @ text.T
            order = overall.argsort(dim=-1, descending=True, stable=True)
            dropped = torch.ones_like(overall, dtype=torch.bool)
            dropped.scatter_(1, order[:, :top_k], False)
            logits = logits.masked_fill(dropped[:, None], float("-inf"))
        return logits.softmax(dim=-1) * scores


def _initialise(model: ZeroSeg) -> None:
    """MAE's rules for encoder and heads; GroupViT's for group tokens."""
    for part in filter(None, (model.encoder, model.decoder, model.seg)):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    patches = cast(nn.Conv2d, model.encoder.patch_embed["proj"]).weight
    nn.init.xavier_uniform_(patches.view(patches.shape[0], -1))
    nn.init.normal_(model.encoder.cls_token, std=0.02)
    if model.decoder is not None:
        nn.init.normal_(model.decoder.mask_token, std=0.02)
    first = model.seg.stages[0]
    assert not isinstance(first, GroupingBlock)
    nn.init.trunc_normal_(first.group_token, std=0.02)  # type: ignore[arg-type]


# --- from a checkpoint of our own, or from MAE's encoder ---

_NOT_OURS = (r"text_encoder\..*",)  # CLIP's, loaded from CLIP's own weights
_MAE_DECODER = (r"mask_token", r"decoder_.*")


@dataclass(frozen=True, kw_only=True)
class ZeroSegStart(ClipSource):
    """Starts ZeroSeg: from a checkpoint of our own, from MAE's encoder, or untrained.

    The settings from ``width`` on, and ``num_heads``, are those of :class:`ZeroSegConfig`. None
    leaves its default, or with ``weights`` what shapes say.
    """

    # The teacher's CLIP weights, whose text tower embeds class names. Without weights, embed_dim is
    # theirs unless it is given. None builds no text tower
    pretrained: str | Path | None = None
    clip: str = "ViT-L-14"
    # A checkpoint of our own training, with the names encoder.*, seg.* and optionally decoder.*.
    # Its sizes are read from shapes
    weights: str | Path | None = None
    # A public MAE checkpoint whose encoder the student starts from, such as
    # mae_pretrain_vit_base.pth; the reconstruction head and the segmentation head start untrained.
    # The paper does not say whether it did so
    mae_weights: str | Path | None = None
    # Input size in pixels that a bundle is built for, a side or (height, width)
    image_size: int | tuple[int, int] = 448
    logit_scale: float = 100.0  # Multiplies cosines before the softmax
    # Number of classes kept, those nearest to the whole image; None keeps all
    top_k: int | None = 5
    with_decoder: bool = True  # Whether to keep the reconstruction head, which only training needs
    width: int | None = None
    num_layers: int | None = None
    patch_size: int | None = None
    grid_side: int | None = None
    decoder_width: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    head_heads: int | None = None
    head_layers: tuple[int, int, int] | None = None
    group_tokens: tuple[int, int] | None = None
    embed_dim: int | None = None
    background_threshold: float | None = None
    templates: tuple[str, ...] | None = None

    def build(self) -> ZeroSeg:
        if self.weights is not None and self.mae_weights is not None:
            raise ArgumentError(
                "mae_weights: expected no more than one of weights and mae_weights, got both. "
                "weights hold the encoder too."
            )
        fields, text_encoder = self._fields(), None
        if self.pretrained is not None:  # num_heads are the student's, not the teacher's
            text_encoder = build_text_encoder(replace(self, num_heads=None).load())
        if self.weights is not None:
            model = _trained(load_checkpoint(self.weights), fields)
        else:
            if text_encoder is not None:
                fields.setdefault("embed_dim", text_encoder.config.embed_dim)
            model = ZeroSeg(ZeroSegConfig(**fields))
        if self.mae_weights is not None:
            load_mae_encoder(model, load_checkpoint(self.mae_weights))
        if text_encoder is not None:
            model.text_encoder = _matching(text_encoder, model.config.embed_dim)
        return model.eval()

    def _fields(self) -> dict[str, Any]:
        side = self.image_size
        size_hw = side if isinstance(side, tuple) else (side, side)
        fields = shared_fields(self, ZeroSegConfig) | {"size_hw": size_hw, "top_k": self.top_k}
        return fields if self.with_decoder else fields | {"decoder_layers": 0}


def load_mae_encoder(model: ZeroSeg, state_dict: Mapping[str, Tensor]) -> None:
    """Copy MAE's encoder, float32, into the student; MAE's decoder is not used."""
    check_float32(state_dict, "MAE")
    load_weights(model.encoder, state_dict, architecture="MAE's encoder", ignored=_MAE_DECODER)


def _trained(state_dict: Mapping[str, Tensor], fields: dict[str, Any]) -> ZeroSeg:
    check_float32(state_dict, "zeroseg")
    read = _read_sizes(state_dict, fields)
    conflicts = [name for name in read if name in fields and fields[name] != read[name]]
    if conflicts and conflicts != ["decoder_layers"]:
        name = next(name for name in conflicts if name != "decoder_layers")
        raise ArgumentError(
            f"{name}: expected {read[name]}, as in the checkpoint, got {fields[name]}. "
            "Leave it out."
        )
    config = ZeroSegConfig(**(read | fields))
    unused = _NOT_OURS if config.decoder_layers else (*_NOT_OURS, r"decoder\..*")
    return load_into(ZeroSeg, config, state_dict, architecture="zeroseg", ignored=unused)


def _read_sizes(state_dict: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes from shapes; one head per 64 channels (32 in the decoder) by default."""
    file = Checked(tensors=state_dict, what="zeroseg")
    width, _, patch_size, _ = file.shape("encoder.patch_embed.proj.weight", 4)
    read = {
        "width": width,
        "patch_size": patch_size,
        "grid_side": file.grid_side("encoder.pos_embed", 3),
        "num_layers": file.depth("encoder.blocks."),
        "num_heads": divisor("num_heads", fields.get("num_heads"), width),
        "head_heads": divisor("head_heads", fields.get("head_heads"), width),
        "head_layers": tuple(file.depth(f"seg.stages.{i}.blocks.") for i in range(3)),
        "group_tokens": tuple(file.shape(f"seg.stages.{i}.group_token", 3)[1] for i in range(2)),
        "embed_dim": file.shape("seg.proj.2.weight", 2)[0],
    }
    if not file.has("decoder."):
        return read | {"decoder_layers": 0}
    width = file.shape("decoder.decoder_embed.weight", 2)[0]
    heads = fields.get("decoder_heads") or max(1, width // 32)
    return read | {
        "decoder_layers": file.depth("decoder.decoder_blocks."),
        "decoder_width": width,
        "decoder_heads": divisor("decoder_heads", heads, width),
    }


def _matching(text_encoder: TextEncoder, embed_dim: int) -> TextEncoder:
    width = text_encoder.config.embed_dim
    if width != embed_dim:
        raise CheckpointError(
            f"pretrained: expected the teacher's text tower with embeddings of {embed_dim}, got "
            f"{width}. Use the CLIP model that the student was distilled from."
        )
    return text_encoder
