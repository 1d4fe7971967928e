"""ZeroSeg: an MAE student that learns segments from CLIP's image encoder alone.

Nothing official can be loaded: neither code nor weights were published. What the paper leaves open
is an option of :class:`ZeroSegConfig` whose default ``docs/zeroseg.md`` explains.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.functional import upsample_argmax
from zsseg_rt.models.input_checks import check_size
from zsseg_rt.models.text_encoder import TextEncoder
from zsseg_rt.models.zeroseg_encoder import MaskedTokens, ReconstructionHead, StudentEncoder
from zsseg_rt.models.zeroseg_grouping import (
    PROJECTIONS,
    SEGMENT_TAPS,
    GroupingBlock,
    Projection,
    SegmentationHead,
    SegmentOutput,
    SegmentTap,
)
from zsseg_rt.models.zeroseg_labels import (
    ClassRule,
    check_threshold,
    class_scores,
    pixel_segments,
    spread_scores,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ZEROSEG_TEMPLATES",
    "FoldedZeroSeg",
    "SegmentTokens",
    "ZeroSeg",
    "ZeroSegConfig",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ZEROSEG_TEMPLATES = ("a photo of a {}.",)
"""GroupViT's "simple" prompt; the paper's example."""


@dataclass(frozen=True, kw_only=True)
class ZeroSegConfig:
    """What defines a ZeroSeg model besides its weights; defaults for the paper's student.

    Attributes:
        width: Token width of the encoder.
        num_layers: Blocks of the encoder.
        num_heads: Attention heads of the encoder.
        patch_size: Side of a patch, in pixels.
        grid_side: Side of the patch grid in training: 14 is 224 pixels.
        decoder_width: Token width of the reconstruction head.
        decoder_layers: Blocks of the reconstruction head; 0 for a model without one.
        decoder_heads: Attention heads of the reconstruction head.
        head_width: Token width of the segmentation head; another than the encoder's adds a linear
            layer before it. Not in the paper.
        head_heads: Attention heads of the segmentation head. Not in the paper.
        head_layers: Blocks before the first grouping, before the second, and after it. The paper
            says five and where the groupings are; that the fifth is the block that "encodes all
            segment tokens" is inferred.
        group_tokens: Groups of the two groupings.
        embed_dim: Width D of the teacher's joint space.
        projection: ``"gelu"`` or GroupViT's ``"batch_norm"``. Not in the paper.
        projection_width: Width inside the projection. Not in the paper.
        segment_tap: Where segment embeddings leave the head: ``"last_block"`` through the shared
            projection or ``"second_grouping"`` through a linear layer. Not in the paper.
        drop_path: Stochastic depth of the head, in training. Not in the paper.
        gumbel_tau: Temperature of the assignment, in training; GroupViT's.
        assign_eps: Added to group sizes before dividing by them; GroupViT's.
        rule: How segments are compared with classes; GroupViT's.
        background_threshold: Score under which a bundle's pixels are unknown. None keeps all.
        size_hw: Input size in pixels that a bundle is made for; the model itself takes any.
        templates: Prompts with one ``{}`` each.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    patch_size: int = 16
    grid_side: int = 14
    decoder_width: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    head_width: int = 768
    head_heads: int = 12
    head_layers: tuple[int, int, int] = (2, 2, 1)
    group_tokens: tuple[int, int] = (32, 8)
    embed_dim: int = 768
    projection: Projection = "gelu"
    projection_width: int = 3072
    segment_tap: SegmentTap = "last_block"
    drop_path: float = 0.0
    gumbel_tau: float = 1.0
    assign_eps: float = 1.0
    rule: ClassRule = field(default_factory=ClassRule)
    background_threshold: float | None = None
    size_hw: tuple[int, int] = (448, 448)
    templates: tuple[str, ...] = ZEROSEG_TEMPLATES

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.projection not in PROJECTIONS:
            raise ArgumentError(
                f"projection: expected one of {', '.join(PROJECTIONS)}, got {self.projection!r}. "
                "Check the spelling."
            )
        if self.segment_tap not in SEGMENT_TAPS:
            raise ArgumentError(
                f"segment_tap: expected one of {', '.join(SEGMENT_TAPS)}, got "
                f"{self.segment_tap!r}. Check the spelling."
            )
        if not 0 <= self.drop_path < 1:
            raise ArgumentError(
                f"drop_path: expected a share in [0, 1), got {self.drop_path}. Change it."
            )
        for name in ("gumbel_tau", "assign_eps"):
            if not getattr(self, name) > 0:
                raise ArgumentError(
                    f"{name}: expected a number above 0, got {getattr(self, name)}. Use 1."
                )
        check_threshold(self.background_threshold)
        check_size(self.size_hw, self.patch_size)

    def _check_sizes(self) -> None:
        for heads, width in (
            ("num_heads", "width"),
            ("head_heads", "head_width"),
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
                f"and decoder_width {self.decoder_width}. Change them."
            )
        if len(self.head_layers) != 3 or len(self.group_tokens) != 2 or min(self.group_tokens) < 1:
            raise ArgumentError(
                f"head_layers: expected three counts, and two positive counts in group_tokens, got "
                f"{self.head_layers} and {self.group_tokens}. The defaults are (2, 2, 1), (32, 8)."
            )


class SegmentTokens(NamedTuple):
    """What a picture is made of.

    Attributes:
        segment_embeds: ``[B, G, D]``, not normalised.
        image_embed: ``[B, D]``, not normalised.
        group_map: Share of every segment in every patch, ``[B, G, gh, gw]``; sums to 1 over G.
    """

    segment_embeds: Tensor
    image_embed: Tensor
    group_map: Tensor


class ZeroSeg(nn.Module):
    """Student encoder, segmentation head, and for training the reconstruction head.

    Pictures are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`.

    Args:
        config: Sizes and rules.

    Attributes:
        architecture: Name of the system.
        image_mean: Of R, G, B, in ``[0, 1]``.
        image_std: Of R, G, B, in ``[0, 1]``.
        decoder: The reconstruction head, or None.
        text_encoder: The teacher's text tower if one was added, not trained.
    """

    architecture: ClassVar[str] = "zeroseg"

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self.encoder = StudentEncoder(
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            grid_side=config.grid_side,
        )
        self.decoder = _reconstruction_head(config) if config.decoder_layers else None
        self.seg = _segmentation_head(config)
        self.text_encoder: TextEncoder | None = None
        _initialise(self)

    def forward(self, image: Tensor) -> SegmentTokens:
        """Find the segments of pictures; in evaluation mode the result is deterministic.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A rest below one patch at the right and the bottom is not seen.

        Raises:
            ShapeError: The image has another layout.
            DTypeError: The image is not of floating point.
        """
        output = self.seg(self.encoder(image).patch_tokens)
        grid_hw = self.encoder.grid_hw((image.shape[2], image.shape[3]))
        return _segment_tokens(output, grid_hw)

    def predict(
        self, image: Tensor, text_embeds: Tensor, *, background_threshold: float | None = None
    ) -> Tensor:
        """Scores of every class at every pixel: those of the pixel's segment.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.
            background_threshold: Score under which a segment is background; None: no background.

        Returns:
            ``[B, C, H, W]`` in [0, 1], or ``[B, 1 + C, H, W]`` with the background first.

        Raises:
            ShapeError: An argument has another shape.
            DTypeError: The image is not of floating point.
        """
        tokens = self(image)
        scores = self.class_scores(tokens, text_embeds)
        segments = pixel_segments(tokens.group_map, (image.shape[2], image.shape[3]))
        return spread_scores(scores, segments, background_threshold)

    @torch.no_grad()
    def segment(
        self, image: Tensor, text_embeds: Tensor, out_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Label every pixel as the engine does: one pass over the whole picture, any output size.

        The shares are upsampled to ``out_hw`` directly. A segment that is background by the
        configured ``background_threshold`` is unknown.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.
            out_hw: Height and width of the labels.

        Returns:
            Labels int64 ``[B, *out_hw]``, -1 for unknown, and each pixel's score.

        Raises:
            ShapeError: An argument has another shape.
            DTypeError: The image is not of floating point.
        """
        tokens = self(image)
        best, classes = self.class_scores(tokens, text_embeds).max(dim=2)
        threshold = self.config.background_threshold
        if threshold is not None:
            limit = best.amax(dim=1, keepdim=True).clamp(max=threshold)
            classes = classes.masked_fill(best < limit, -1)
        segments = upsample_argmax(tokens.group_map, out_hw)[0].long().flatten(1)
        labels, scores = classes.gather(1, segments), best.gather(1, segments)
        return torch.unflatten(labels, 1, out_hw), torch.unflatten(scores, 1, out_hw)

    def class_scores(self, tokens: SegmentTokens, text_embeds: Tensor) -> Tensor:
        """Scores of every class for every segment ``[B, G, C]`` by the configured rule."""
        return class_scores(
            tokens.segment_embeds, tokens.image_embed, text_embeds, self.config.rule
        )

    def fold_for_inference(self, size_hw: tuple[int, int] | None = None) -> FoldedZeroSeg:
        """Make the graph that is exported.

        Args:
            size_hw: Input size in pixels; None is the configured one.

        Raises:
            ShapeError: Patches do not fill the picture.
        """
        return FoldedZeroSeg(self, size_hw or self.config.size_hw)


class FoldedZeroSeg(nn.Module):
    """A :class:`ZeroSeg` for one input size: positions are constants, nothing of training is left.

    Args:
        model: The model; weights are shared with it, not copied. It is put in evaluation mode.
        size_hw: Picture size in pixels, multiples of the patch size.

    Raises:
        ShapeError: Patches do not fill the picture.
    """

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
        """As :meth:`ZeroSeg.forward`, for pictures ``[B, 3, *size_hw]``."""
        patches = self.encoder.patch_embed(image) + self.positions
        cls_token = self.cls_token.expand(image.shape[0], -1, -1)
        tokens: MaskedTokens = self.encoder.encode(torch.cat([cls_token, patches], dim=1))
        return _segment_tokens(self.seg(tokens.patch_tokens), self.grid_hw)


def _segment_tokens(output: SegmentOutput, grid_hw: tuple[int, int]) -> SegmentTokens:
    group_map = torch.unflatten(output.group_map(), 2, grid_hw)
    return SegmentTokens(output.segment_embeds, output.image_embed, group_map)


def _reconstruction_head(config: ZeroSegConfig) -> ReconstructionHead:
    return ReconstructionHead(
        encoder_width=config.width,
        width=config.decoder_width,
        num_layers=config.decoder_layers,
        num_heads=config.decoder_heads,
        patch_size=config.patch_size,
        grid_side=config.grid_side,
    )


def _segmentation_head(config: ZeroSegConfig) -> SegmentationHead:
    return SegmentationHead(
        encoder_width=config.width,
        width=config.head_width,
        num_heads=config.head_heads,
        num_layers=config.head_layers,
        group_tokens=config.group_tokens,
        embed_dim=config.embed_dim,
        projection=config.projection,
        projection_width=config.projection_width,
        segment_tap=config.segment_tap,
        drop_path=config.drop_path,
        tau=config.gumbel_tau,
        eps=config.assign_eps,
    )


def _initialise(model: ZeroSeg) -> None:
    """MAE's rules for encoder and heads; GroupViT's for group tokens."""
    parts: Sequence[nn.Module | None] = (model.encoder, model.decoder, model.seg)
    for part in parts:
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    patches = model.encoder.patch_embed.proj.weight
    nn.init.xavier_uniform_(patches.view(patches.shape[0], -1))
    nn.init.normal_(model.encoder.cls_token, std=0.02)
    if model.decoder is not None:
        nn.init.normal_(model.decoder.mask_token, std=0.02)
    first = model.seg.stages[0]
    assert not isinstance(first, GroupingBlock)
    nn.init.trunc_normal_(first.group_token, std=0.02)  # type: ignore[arg-type]
