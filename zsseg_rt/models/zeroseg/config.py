"""Everything that defines a ZeroSeg model besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.zeroseg.labels import ClassRule, check_threshold

Projection = Literal["gelu", "batch_norm"]
SegmentTap = Literal["last_block", "second_grouping"]

ZEROSEG_TEMPLATES = ("a photo of a {}.",)
"""GroupViT's "simple" prompt, which is the paper's example."""


@dataclass(frozen=True, kw_only=True)
class ZeroSegConfig:
    """Everything that defines a ZeroSeg model besides its weights; the paper's student by default.

    Attributes:
        width: Token width of the encoder.
        num_layers: Blocks of the encoder.
        num_heads: Attention heads of the encoder.
        patch_size: Side of a patch, in pixels.
        grid_side: Side of the patch grid in training: 14 for 224 pixels.
        decoder_width: Token width of the reconstruction head.
        decoder_layers: Blocks of the reconstruction head; 0 for a model without one.
        decoder_heads: Attention heads of the reconstruction head.
        head_width: Token width of the segmentation head; unless it is the encoder's, a linear layer
            precedes the head. Not in the paper.
        head_heads: Attention heads of the segmentation head. Not in the paper.
        head_layers: Blocks before the first grouping, before the second, and after it. The paper
            says five and where the groupings are; that the fifth is the block that "encodes all
            segment tokens" is inferred.
        group_tokens: Numbers of groups in the two groupings.
        embed_dim: Width D of the teacher's joint space.
        projection: ``"gelu"`` or GroupViT's ``"batch_norm"``. Not in the paper.
        projection_width: Width inside the projection. Not in the paper.
        segment_tap: Where segment embeddings leave the head: ``"last_block"`` through the shared
            projection or ``"second_grouping"`` through a linear layer. Not in the paper.
        drop_path: Stochastic depth of the head, in training. Not in the paper.
        gumbel_tau: Temperature of the assignment, in training; GroupViT's.
        assign_eps: Added to group sizes before dividing by them; GroupViT's.
        rule: How segments are compared with classes; GroupViT's.
        background_threshold: Score below which a bundle's pixels are unknown. None keeps all.
        size_hw: Input size in pixels that a bundle is built for; the model itself takes any size.
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
        check_choice("projection", self.projection, get_args(Projection))
        check_choice("segment_tap", self.segment_tap, get_args(SegmentTap))
        if not 0 <= self.drop_path < 1:
            raise ArgumentError(
                f"drop_path: expected a share in [0, 1), got {self.drop_path}. Use 0 for none."
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
                f"and decoder_width {self.decoder_width}. Use multiples of 4."
            )
        if len(self.head_layers) != 3 or len(self.group_tokens) != 2 or min(self.group_tokens) < 1:
            raise ArgumentError(
                f"head_layers: expected three counts, and two positive counts in group_tokens, got "
                f"{self.head_layers} and {self.group_tokens}. The defaults are (2, 2, 1), (32, 8)."
            )
