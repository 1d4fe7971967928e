"""What ZegCLIP and CLIP-RC share: class queries from image and text, masks, the official scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common import schema
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    ScoreActivation,
    SegmentationOutput,
    lower_seen,
)
from zsseg_rt.models.clip.image_encoder import (
    ImageEncoderConfig,
    PromptedImageEncoder,
)
from zsseg_rt.models.clip.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.models.descriptor.mask_decoder import DecoderConfig
from zsseg_rt.models.sliding import SlideSettings
from zsseg_rt.torch_files.descriptor_arrays import IMAGE_MEAN, IMAGE_STD

_RETIRED = ("start_offset", "start_scale", "low_initial_logits")
_INSTEAD = "Leave it out; in a checkout, tools.studies.starts.HeadStart gives such initial weights."


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings of retired initial weights, as :func:`schema.without_retired` does."""
    starts = ("start",) if settings.get("start") == "aligned" else ()
    return schema.without_retired(settings, dict.fromkeys((*_RETIRED, *starts), _INSTEAD))


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig:
    """Everything that defines a model besides its weights; the defaults are VOC's.

    Attributes:
        image_encoder: Image tower.
        decoder: Mask decoder.
        text_encoder: Text tower, or None for a model that is given text embeddings only.
        image_size: Side in pixels that mask logits are upsampled to before the sigmoid, whatever
            the input's size (official ``img_size``).
        seen_classes: Rows of the text embeddings whose classes were trained on; their scores are
            lowered by ``seen_bias``. Empty: no score is lowered.
        self_trained: Whether the weights come from self-training; then no score is lowered.
        seen_bias: How much they are lowered, as a probability.
        score_activation: What turns mask logits into probabilities. Officially a sigmoid;
            ``"softmax"`` over classes is for models trained with cross entropy.
    """

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text_encoder: TextEncoderConfig | None = None
    image_size: int = 512
    seen_classes: tuple[int, ...] = ()
    self_trained: bool = False
    seen_bias: float = 0.1
    score_activation: ScoreActivation = "sigmoid"

    from_earlier = staticmethod(without_retired)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.image_size, (int, np.integer)) or self.image_size < 1:
            raise ArgumentError(
                f"image_size: expected the side of a square in pixels, got {self.image_size!r}. "
                "Leave it out for the size of the positional embedding."
            )
        check_choice("score_activation", self.score_activation, get_args(ScoreActivation))


class DescriptorModel(PixelModel):
    """A CLIP image tower with deep prompts, a relationship descriptor and a decode head.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`
    (ImageNet's, not CLIP's). Only the prompts, ``prompt_norm`` and the decode head require
    gradients. ``independent_queries``: whether the decoder treats every class query by itself.
    """

    image_mean = IMAGE_MEAN
    image_std = IMAGE_STD
    independent_queries: ClassVar[bool]
    config: DescriptorConfig

    def __init__(
        self, config: DescriptorConfig, backbone: PromptedImageEncoder, decode_head: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.decode_head = decode_head
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder else None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("decode_head.") or "prompt" in name)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors that training updates; everything else is frozen.

        As in the official code, some of them never receive a gradient.
        """
        return (pair for pair in self.named_parameters() if pair[1].requires_grad)

    def freeze_unread(self) -> None:
        """Freeze the parameters that official checkpoints hold but no forward pass reads."""

    @abstractmethod
    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compute mask logits at the grid's resolution.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch
                (officially square).
            text_embeds: Class embeddings, ``[C, D]``, unit norm; brought to the image's dtype.

        Returns:
            Mask logits, patch embeddings and class embeddings.
        """

    @abstractmethod
    def encoder_outputs(self, output: SegmentationOutput) -> tuple[Tensor, Tensor]:
        """What the exported image encoder returns for a forward pass's image.

        Computed from the pass's own output, so that the folded encoder can be checked against it.

        Returns:
            ``patch_embeds`` ``[1, N, M]`` and ``cls_embed`` ``[R, D]``.
        """

    @property
    def size_hw(self) -> tuple[int, int]:
        """The input size in pixels that the positional embedding is stored for."""
        return (self.config.image_encoder.side,) * 2

    @property
    def crop_hw(self) -> tuple[int, int]:
        """See :attr:`SegmentationModel.crop_hw`."""
        return self.config.image_size, self.config.image_size

    @property
    def windows(self) -> SlideSettings:
        """Short side and window are the input's; windows step by 426 / 512 of it."""
        side = self.size_hw[0]
        return SlideSettings(short_side=side, crop_size=side, stride=side * 426 // 512)

    @property
    def label_rule(self) -> LabelRule:
        """See :attr:`PixelModel.label_rule`."""
        config = self.config
        return LabelRule(
            activation=config.score_activation,
            seen_classes=() if config.self_trained else config.seen_classes,
            seen_bias=config.seen_bias,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel, as the official evaluation does.

        Mask logits are upsampled to ``image_size`` (bilinear), squashed by the activation, lowered
        by ``seen_bias`` for seen classes unless the model is self-trained, and resized to the
        input.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``, unit norm.

        Returns:
            ``[B, C, H, W]``, in ``[-seen_bias, 1]``.
        """
        logits = self.upsample(self(image, text_embeds).mask_logits)
        rule = self.label_rule
        scores = lower_seen(self.activate(logits), rule.seen_classes, rule.seen_bias)
        return _resize(scores, (image.shape[2], image.shape[3]))

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits ``[B, C, H, W]`` into probabilities, as :attr:`label_rule` says."""
        softmax = self.label_rule.activation == "softmax"
        return logits.softmax(dim=1) if softmax else logits.sigmoid()

    def upsample(self, mask_logits: Tensor) -> Tensor:
        """Upsample mask logits ``[B, C, gh, gw]`` to ``[B, C, image_size, image_size]``."""
        return _resize(mask_logits, (self.config.image_size, self.config.image_size))


def _resize(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if x.shape[2:] == size_hw:
        return x
    return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)
