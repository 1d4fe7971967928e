"""What defines a ZegFormer model besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.image_encoder import ImageEncoderConfig
from zsseg_rt.models.text_encoder import TextEncoderConfig
from zsseg_rt.models.zegformer_backbone import ResNetConfig
from zsseg_rt.models.zegformer_decoder import QueryDecoderConfig
from zsseg_rt.models.zegformer_regions import REGION_STYLES, RegionStyle

__all__ = ["ZegFormerConfig"]


@dataclass(frozen=True, kw_only=True)
class ZegFormerConfig:
    """What defines a ZegFormer model besides its weights.

    Attributes:
        backbone: Backbone.
        decoder: Pixel decoder and query decoder.
        clip_image: CLIP's image tower, or None for a model without CLIP.
        clip_text: CLIP's text tower; given exactly if ``clip_image`` is.
        seen_classes: Rows of the class embeddings whose classes were trained on. Empty: none was.
        calibration: What is taken off the score maps of seen classes (official
            ``GZERO_CALIBRATE``); nothing if not above zero.
        clip_classification: Whether CLIP classifies regions (official ``CLIP_CLASSIFICATION``).
            Without, the text branch decides alone.
        ensemble: Whether both branches decide together, weighted differently for seen and unseen
            classes (official ``ENSEMBLING``). Without, CLIP decides alone.
        ensemble_all_classes: Whether they decide together with the weights of unseen classes for
            every class (official ``ENSEMBLING_ALL_CLS``); replaces ``ensemble``.
        region_style: What CLIP is shown of a segment (official ``CLIP_CLS_STYLE``); see
            :func:`zsseg_rt.models.zegformer_regions.crop_regions`.
        region_batch: Regions that are cut out and encoded at once; bounds the memory.
        size_divisor: Pictures are padded to multiples of it.
        image_size: Short side that pictures are resized to, in pixels (official
            ``MIN_SIZE_TEST``: 512, for COCO-Stuff 640).
    """

    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    decoder: QueryDecoderConfig = field(default_factory=QueryDecoderConfig)
    clip_image: ImageEncoderConfig | None = None
    clip_text: TextEncoderConfig | None = None
    seen_classes: tuple[int, ...] = ()
    calibration: float = 0.1
    clip_classification: bool = True
    ensemble: bool = True
    ensemble_all_classes: bool = False
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10
    size_divisor: int = 32
    image_size: int = 512

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ArgumentError: A setting is outside its range.
        """
        if self.region_style not in REGION_STYLES:
            raise ArgumentError(
                f"region_style: expected one of {', '.join(REGION_STYLES)}, got "
                f"'{self.region_style}'. Check the spelling."
            )
        if self.region_batch < 1:
            raise ArgumentError(
                f"region_batch: expected at least 1, got {self.region_batch}. "
                "Use a smaller number for less memory."
            )
        if self.image_size < 1:
            raise ArgumentError(
                f"image_size: expected at least 1 pixel, got {self.image_size}. Officially 512."
            )
