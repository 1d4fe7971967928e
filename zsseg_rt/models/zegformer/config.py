"""Everything that defines a ZegFormer model besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.clip.image_encoder import ImageEncoderConfig
from zsseg_rt.models.clip.text_encoder import TextEncoderConfig
from zsseg_rt.models.zegformer.backbone import ResNetConfig
from zsseg_rt.models.zegformer.decoder import QueryDecoderConfig
from zsseg_rt.models.zegformer.regions import REGION_STYLES, RegionStyle

Fusion = Literal["seen_and_unseen", "all_classes", "regions", "segments"]
FUSIONS: tuple[str, ...] = get_args(Fusion)

_FLAGS = ("ensemble", "ensemble_all_classes", "clip_classification")


def fusion_of_flags(
    *,
    ensemble: bool = True,
    ensemble_all_classes: bool = False,
    clip_classification: bool = True,
) -> Fusion:
    """Translate the flags of the official configuration.

    Example:
        >>> fusion_of_flags(ensemble=False)
        'regions'
    """
    if not clip_classification:
        return "segments"
    if ensemble_all_classes:
        return "all_classes"
    return "seen_and_unseen" if ensemble else "regions"


def with_fusion(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the flags of earlier versions replaced by one ``fusion``.

    Example:
        >>> with_fusion({"ensemble": False, "queries": 100})
        {'queries': 100, 'fusion': 'regions'}
    """
    flags = {name: settings[name] for name in _FLAGS if name in settings}
    rest = {name: value for name, value in settings.items() if name not in flags}
    return rest | {"fusion": fusion_of_flags(**flags)} if flags else rest


@dataclass(frozen=True, kw_only=True)
class ZegFormerConfig:
    """Everything that defines a ZegFormer model besides its weights.

    Attributes:
        backbone: Backbone.
        decoder: Pixel decoder and query decoder.
        clip_image: CLIP's image tower, or None for a model without CLIP.
        clip_text: CLIP's text tower; set if and only if ``clip_image`` is.
        seen_classes: Rows of the class embeddings whose classes were trained on. Empty: no class.
        calibration: What is subtracted from the score maps of seen classes (official
            ``GZERO_CALIBRATE``); nothing if zero or less.
        fusion: Who decides. ``"seen_and_unseen"``: the text branch and CLIP together, weighted
            differently for seen and unseen classes. ``"all_classes"``: together, with the weights
            of unseen classes for every class. ``"regions"``: CLIP alone, at regions.
            ``"segments"``: the text branch alone; CLIP classifies no regions.
        region_style: What CLIP is shown of each segment (official ``CLIP_CLS_STYLE``); see
            :func:`zsseg_rt.models.zegformer.regions.crop_regions`.
        region_batch: Regions that are cut out and encoded at once; limits memory use.
        size_divisor: Images are padded to multiples of this many pixels.
        image_size: Short side that images are resized to, in pixels (official
            ``MIN_SIZE_TEST``: 512, for COCO-Stuff 640).
    """

    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    decoder: QueryDecoderConfig = field(default_factory=QueryDecoderConfig)
    clip_image: ImageEncoderConfig | None = None
    clip_text: TextEncoderConfig | None = None
    seen_classes: tuple[int, ...] = ()
    calibration: float = 0.1
    fusion: Fusion = "seen_and_unseen"
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10
    size_divisor: int = 32
    image_size: int = 512

    from_earlier = staticmethod(with_fusion)

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("region_style", self.region_style, REGION_STYLES)
        if self.region_batch < 1:
            raise ArgumentError(
                f"region_batch: expected at least 1, got {self.region_batch}. "
                "Use a smaller number for less memory."
            )
        if self.image_size < 1:
            raise ArgumentError(
                f"image_size: expected at least 1 pixel, got {self.image_size}. Officially 512."
            )
