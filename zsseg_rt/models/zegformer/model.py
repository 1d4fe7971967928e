"""ZegFormer: class-agnostic segments, classified by text and again by CLIP.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.base import SegmentationModel, check_seen
from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoder, TextEncoderConfig, unit
from zsseg_rt.models.functional import check_text_embeds
from zsseg_rt.models.sliding import LONGEST_SIDE, check_pictures, resize_picture
from zsseg_rt.models.zegformer.backbone import ResNet, ResNetConfig
from zsseg_rt.models.zegformer.decoder import (
    REGION_STYLES,
    Clip,
    PixelDecoder,
    QueryDecoderConfig,
    RegionStyle,
    SegmentPredictor,
    Segments,
    crop_regions,
    upsample_masks,
)
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD, REGION_MEAN, REGION_STD
from zsseg_rt.torch_files.zegformer_prompts import REGION_TEMPLATES

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
            :func:`zsseg_rt.models.zegformer.decoder.crop_regions`.
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


_TRUSTED = 2 / 3  # exponent of the branch that is trusted more; the other gets the rest


@dataclass(frozen=True)
class ZegFormerOutput:
    """What a forward pass returns.

    Attributes:
        pred_logits: The text branch's class logits, ``[B, Q, C + 1]``; the last is "no object".
        pred_masks: Mask logits at a quarter of the padded size, ``[B, Q, h / 4, w / 4]``.
        clip_logits: CLIP's class logits followed by the text branch's "no object",
            ``[B, Q, C + 1]``; None without CLIP.
        class_scores: Each segment's class weights after fusion, ``[B, Q, C]``.
        sem_seg: Score maps of each image, ``[C, H, W]``.
    """

    pred_logits: Tensor
    pred_masks: Tensor
    clip_logits: Tensor | None
    class_scores: Tensor
    sem_seg: list[Tensor]


class SegmentationHead(nn.Module):
    """Both decoders."""

    def __init__(
        self, config: QueryDecoderConfig, channels: tuple[int, ...], clip: Clip | None
    ) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(channels, config.conv_dim, config.mask_dim)
        self.predictor = SegmentPredictor(config, channels[-1], clip)

    def forward(self, maps: list[Tensor], text_features: Tensor) -> Segments:
        """Propose the last layer's segments; see :class:`SegmentPredictor`."""
        queries = self.predictor.decode(maps[-1])[-1]
        segments = self.predictor(queries, self.pixel_decoder(maps), text_features)
        return cast(Segments, segments)


class ZegFormer(SegmentationModel):
    """The complete model. Its CLIP is frozen.

    A class's embedding is the mean of its synonyms'. (Officially the mean over all prompts of all
    synonyms at once, which differs where there are several prompts: 3e-4 with eight. At run time
    the best synonym counts instead.)
    """

    architecture = "zegformer"
    averages_synonyms: ClassVar[bool] = True
    config: ZegFormerConfig

    def __init__(self, config: ZegFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        clip = None
        if config.clip_image is not None and config.clip_text is not None:
            clip = Clip(config.clip_image, config.clip_text)
        self.sem_seg_head = SegmentationHead(config.decoder, config.backbone.channels, clip)
        if self.clip_model is not None:
            self.clip_model.requires_grad_(False)

    @property
    def clip_model(self) -> Clip | None:
        """CLIP, or None."""
        return self.sem_seg_head.predictor.clip_model

    @property
    def text_encoder(self) -> TextEncoder | None:
        """CLIP's text tower, or None."""
        return self.clip_model

    @property
    def size_hw(self) -> tuple[int, int]:
        """A square of ``image_size``; the official evaluation keeps an image's shape."""
        return self.config.image_size, self.config.image_size

    @property
    def region_templates(self) -> tuple[str, ...]:
        """The official prompts of the CLIP branch; empty if CLIP classifies no regions."""
        return () if self.config.fusion == "segments" else REGION_TEMPLATES

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label as the official evaluation does: the whole image, in its own shape.

        See :meth:`SegmentationModel.label`; no pixel is unknown.
        """
        resized = torch.from_numpy(resize_picture(rgb, self.config.image_size))
        planes = resized.permute(2, 0, 1).to(text_embeds.device)
        out_hw = (rgb.shape[0], rgb.shape[1])
        return self([planes], text_embeds, region_embeds, [out_hw]).sem_seg[0].argmax(dim=0)  # type: ignore[no-any-return]

    def describe_input(self) -> dict[str, Any]:
        """Side lengths that images are resized to; see :meth:`SegmentationModel.describe_input`."""
        return {"short_side": self.config.image_size, "long_side": LONGEST_SIDE}

    def forward(
        self,
        images: Sequence[Tensor],
        text_features: Tensor,
        text_features_clip: Tensor | None,
        out_hw: Sequence[tuple[int, int]],
    ) -> ZegFormerOutput:
        """Segment images as the official evaluation does.

        Shapes:
            images: RGB images, uint8 ``[3, h, w]``, already resized. They are padded together.
            text_features: Class embeddings of the text branch, ``[C, D]``, unit norm.
            text_features_clip: Class embeddings of the CLIP branch, ``[C, D]``, unit norm;
                officially made with other prompts. May be None if CLIP classifies no regions.

        Returns:
            Segments, their class weights, and score maps.
        """
        self._check_inputs(images, text_features, text_features_clip, out_hw)
        out_hw = [(int(height), int(width)) for height, width in out_hw]
        planes = self.prepare(images, IMAGE_MEAN, IMAGE_STD)
        segments = self.propose(planes, text_features)
        clip_logits = None
        if self.config.fusion != "segments" and text_features_clip is not None:
            planes = self.prepare(images, REGION_MEAN, REGION_STD)
            clip_logits = self.classify_regions(planes, segments, text_features_clip)
        class_scores = self.fuse(segments.logits, clip_logits)
        padded_hw = (planes.shape[2], planes.shape[3])
        sem_seg = [
            self.score_maps(scores, masks, padded_hw, (image.shape[1], image.shape[2]), size)
            for scores, masks, image, size in zip(
                class_scores, segments.masks, images, out_hw, strict=True
            )
        ]
        return ZegFormerOutput(segments.logits, segments.masks, clip_logits, class_scores, sem_seg)

    def prepare(
        self, images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Normalise images and pad them with zeros, at the right and the bottom, to one size.

        Shapes:
            images: RGB images, uint8 ``[3, h, w]``.

        Returns:
            ``[B, 3, H, W]``; H and W are multiples of ``size_divisor``.
        """
        like = self.sem_seg_head.predictor.bg_feature
        divisor = self.config.size_divisor
        height, width = (
            -(-max(image.shape[axis] for image in images) // divisor) * divisor for axis in (1, 2)
        )
        offset, scale = (
            torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)
            for values in (mean, std)
        )
        planes = like.new_zeros(len(images), 3, height, width)
        for plane, image in zip(planes, images, strict=True):
            plane[:, : image.shape[1], : image.shape[2]] = (image.to(like) - offset) / scale
        return planes

    def propose(self, planes: Tensor, text_features: Tensor) -> Segments:
        """Propose segments.

        Shapes:
            planes: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_features: Class embeddings, ``[C, D]``, unit norm.

        Returns:
            Class logits ``[B, Q, C + 1]`` and mask logits ``[B, Q, H / 4, W / 4]``.
        """
        return self.sem_seg_head(self.backbone(planes), text_features)  # type: ignore[no-any-return]

    def classify_regions(self, planes: Tensor, segments: Segments, text_features: Tensor) -> Tensor:
        """Classify the region of every segment with CLIP, ``region_batch`` regions at a time.

        Shapes:
            planes: RGB planes normalised for CLIP, float ``[B, 3, H, W]``.
            text_features: Class embeddings, ``[C, D]``, unit norm.

        Returns:
            ``[B, Q, C + 1]``.
        """
        clip = self.clip_model
        if clip is None:
            raise ArgumentError(
                "clip: expected a model with CLIP's weights to classify regions, got one without. "
                "Build it with clip=..., or with fusion='segments'."
            )
        style, side = self.config.region_style, clip.image_side
        embeds = torch.stack(
            [
                torch.cat(
                    [
                        clip.embed_images(crop_regions(plane, batch, style=style, side=side))
                        for batch in self._batches(masks)
                    ]
                )
                for plane, masks in zip(planes, segments.masks, strict=True)
            ]
        )
        logits = clip.logit_scale.exp() * unit(embeds) @ text_features.to(embeds).T
        return torch.cat([logits, segments.logits[..., -1:]], dim=-1)

    def _batches(self, x: Tensor) -> list[Tensor]:
        size = self.config.region_batch
        return [x[start : start + size] for start in range(0, len(x), size)]

    def fuse(self, pred_logits: Tensor, clip_logits: Tensor | None) -> Tensor:
        """Combine the two branches' class weights.

        With p from the text branch and p' from CLIP, both softmaxes over classes and "no object":
        unseen classes get ``p^(1/3) p'^(2/3)``; seen ones ``p^(2/3) m^(1/3)``, m being the mean of
        p' over seen classes.

        Shapes:
            pred_logits: ``[..., C + 1]``.
            clip_logits: ``[..., C + 1]``, or None if CLIP classifies no regions.

        Returns:
            ``[..., C]``, in ``[0, 1]``; rows do not sum to one.
        """
        by_text = pred_logits.softmax(dim=-1)[..., :-1]
        fusion = self.config.fusion
        if clip_logits is None or fusion == "segments":
            return by_text
        by_clip = clip_logits.softmax(dim=-1)[..., :-1]
        if fusion == "regions":
            return by_clip
        fused = by_text ** (1 - _TRUSTED) * by_clip**_TRUSTED
        seen = self._seen(fused.shape[-1], fused.device)
        if fusion == "all_classes" or not seen.any():
            return fused
        mean = by_clip[..., seen].mean(dim=-1, keepdim=True)
        return torch.where(seen, by_text**_TRUSTED * mean ** (1 - _TRUSTED), fused)

    def score_maps(
        self,
        class_scores: Tensor,
        mask_logits: Tensor,
        padded_hw: tuple[int, int],
        image_hw: tuple[int, int],
        out_hw: tuple[int, int],
    ) -> Tensor:
        """Sum soft masks with their class weights, and resize.

        Shapes:
            class_scores: ``[Q, C]``.
            mask_logits: ``[Q, h, w]``.

        Returns:
            ``[C, *out_hw]``; seen classes are lowered by ``calibration``.
        """
        maps = class_scores.new_zeros(class_scores.shape[1], padded_hw[0] * padded_hw[1])
        for scores, logits in zip(
            self._batches(class_scores), self._batches(mask_logits), strict=True
        ):
            maps = maps.addmm(scores.T, upsample_masks(logits, padded_hw).sigmoid().flatten(1))
        cut = torch.unflatten(maps, 1, padded_hw)[:, : image_hw[0], : image_hw[1]]
        resized = F.interpolate(cut.unsqueeze(0), size=out_hw, mode="bilinear").squeeze(0)
        if self.config.calibration <= 0:
            return resized
        seen = self._seen(len(resized), resized.device).to(resized.dtype)
        return resized - self.config.calibration * seen.view(-1, 1, 1)

    def _seen(self, num_classes: int, device: torch.device) -> Tensor:
        seen = torch.zeros(num_classes, dtype=torch.bool, device=device)
        seen[list(self.config.seen_classes)] = True
        return seen

    def _check_inputs(
        self,
        images: Sequence[Tensor],
        text_features: Tensor,
        text_features_clip: Tensor | None,
        out_hw: Sequence[tuple[int, int]],
    ) -> None:
        check_pictures(images, out_hw)
        self._check_text("text_features", text_features)
        if self.config.fusion == "segments":
            return
        if text_features_clip is None:
            raise ShapeError(
                f"text_features_clip: expected {list(text_features.shape)}, got None. "
                "Embed the classes for the CLIP branch, or set fusion='segments'."
            )
        self._check_text("text_features_clip", text_features_clip)
        if len(text_features_clip) != len(text_features):
            raise ShapeError(
                f"text_features_clip: expected {len(text_features)} classes like text_features, "
                f"got {len(text_features_clip)}. Embed the same classes for both branches."
            )

    def _check_text(self, name: str, text_features: Tensor) -> None:
        check_text_embeds(text_features, self.config.decoder.embed_dim, name)
        check_seen(self.config.seen_classes, len(text_features), name)
