"""The cosine head: dense CLIP, fine-tuned.

Patches are compared with class names as in dense CLIP, but the image tower, a linear head after it
and the logit scale are trained on annotated images. The head starts as the identity, so that the
match of patches and texts that CLIP has is there from the first step.

It is *not* the baseline of the ZegCLIP paper, as an earlier version said: that one has three
decoder layers which start at random (``zegclip`` with ``descriptor = "text"`` and no prompts,
trained with cross entropy), and the paper does not seem to have measured this head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import ScoreActivation, lower_seen
from zsseg_rt.models.clip.towers import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
    resize_positional_embedding,
    unit,
)
from zsseg_rt.models.clip.weights import image_config, text_config
from zsseg_rt.models.dense.dense_clip import DenseCLIP, DenseCLIPConfig, Head
from zsseg_rt.models.functional import read_class_indices
from zsseg_rt.torch_files.checkpoints import load_weights
from zsseg_rt.torch_files.clip_weights import ClipSource, normalisation_of


@dataclass(frozen=True, kw_only=True)
class CosineHeadConfig(DenseCLIPConfig):
    """Everything that defines the cosine head besides its weights.

    Attributes:
        head: ``"vanilla"``: the last block is unchanged.
        logit_scale: Initial value of the trained scale; the default is CLIP's own start.
        score_activation: What turns logits into probabilities: ``"softmax"`` over classes for
            training with cross entropy, ``"sigmoid"`` for focal and dice loss.
        seen_classes: Rows of the text embeddings whose classes were trained on; their scores are
            lowered by ``seen_bias``.
        seen_bias: How much they are lowered, as a probability; 0 lowers none.
    """

    head: Head = "vanilla"
    logit_scale: float = 1 / 0.07
    score_activation: ScoreActivation = "softmax"
    seen_classes: tuple[int, ...] = ()
    seen_bias: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.head != "vanilla":
            raise ArgumentError(
                f"head: expected 'vanilla', got {self.head!r}. Only the plain last block is "
                "trained; for another head use dense_clip."
            )
        check_choice("score_activation", self.score_activation, get_args(ScoreActivation))
        if not 0 <= self.seen_bias <= 1:
            raise ArgumentError(
                f"seen_bias: expected a probability in [0, 1], got {self.seen_bias}. "
                "Use 0 to lower no score."
            )


class CosineHeadEncoder(ImageEncoder):
    """CLIP's image tower and a linear head on its patches, which starts as the identity."""

    position_mode: ClassVar[Interpolation] = "bicubic"

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        nn.init.eye_(self.head.weight)

    def patch_proj(self) -> Tensor:
        """Projection of patches into the joint space, head included, ``[W, D]``."""
        return self.proj @ self.head.weight.T

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode images; see :meth:`ImageEncoder.forward`."""
        tokens = self.transformer(self.embed_patches(image))
        patches = self.ln_post(tokens[:, 1:]) @ self.patch_proj()
        return ImageEmbeds(unit(patches), unit(self.project(tokens[:, 0])))


class CosineHeadModel(DenseCLIP):
    """Dense CLIP whose image tower, head and logit scale are trained."""

    architecture = "cosine_head"
    predicts_logits: ClassVar[bool] = False
    config: CosineHeadConfig
    image_encoder: CosineHeadEncoder

    def __init__(self, config: CosineHeadConfig) -> None:
        super().__init__(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        if self.text_encoder is not None:
            self.text_encoder.requires_grad_(False)

    def _make_encoder(self) -> CosineHeadEncoder:
        return CosineHeadEncoder(self.config.image_encoder)

    @property
    def description(self) -> str:
        """A human-readable name of the model."""
        return self.architecture

    @property
    def crop_hw(self) -> tuple[int, int]:
        """See :attr:`SegmentationModel.crop_hw`."""
        return self.config.size_hw

    @property
    def logit_scale(self) -> Tensor:
        """The trained factor on cosine similarities."""
        return self.log_scale.exp()

    @property
    def score_activation(self) -> ScoreActivation:
        """What turns logits into probabilities."""
        return self.config.score_activation

    @property
    def seen_classes(self) -> tuple[int, ...]:
        """Rows of the text embeddings whose probabilities are lowered."""
        return self.config.seen_classes if self.config.seen_bias else ()

    @property
    def seen_bias(self) -> float:
        """How much these probabilities are lowered."""
        return self.config.seen_bias

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel.

        Logits are upsampled bilinearly, squashed by the activation, and lowered by ``seen_bias``
        for seen classes.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``.

        Returns:
            ``[B, C, H, W]``, in ``[-seen_bias, 1]``.
        """
        logits = super().predict(image, text_embeds)
        softmax = self.config.score_activation == "softmax"
        scores = logits.softmax(dim=1) if softmax else logits.sigmoid()
        return lower_seen(scores, self.seen_classes, self.seen_bias)


@dataclass(frozen=True, kw_only=True)
class CosineHeadStart(ClipSource):
    """Starts the cosine head from CLIP weights; before training it is dense CLIP's vanilla head.

    The positional embedding is resized to ``image_size`` (bicubic).

    Attributes:
        image_size: Side of training crops and of a bundle's input, in pixels.
        logit_scale: Initial value of the trained scale.
        score_activation: See :class:`CosineHeadConfig`.
        seen_classes: Rows of the text embeddings that are trained on.
        seen_bias: See :class:`CosineHeadConfig`.
        templates: Prompts with one ``{}`` each; None is the 80 ImageNet prompts of CLIP.
    """

    image_size: int = 512
    logit_scale: float = 1 / 0.07
    score_activation: ScoreActivation = "softmax"
    seen_classes: Sequence[int] = ()
    seen_bias: float = 0.0
    templates: Sequence[str] | None = None

    def build(self) -> CosineHeadModel:
        """Make the model, in evaluation mode, with its text tower, which is frozen."""
        weights = self.load()
        assert self.pretrained is not None, "it was loaded"
        encoder = image_config(weights)
        size_hw = (self.image_size, self.image_size)
        check_size(size_hw, encoder.patch_size)
        side = self.image_size // encoder.patch_size
        mean, std = normalisation_of(self.pretrained, self.clip)
        config = CosineHeadConfig(
            image_encoder=replace(encoder, grid_side=side),
            text_encoder=text_config(weights),
            size_hw=size_hw,
            logit_scale=self.logit_scale,
            score_activation=self.score_activation,
            seen_classes=read_class_indices("seen_classes", self.seen_classes),
            seen_bias=self.seen_bias,
            templates=None if self.templates is None else tuple(self.templates),
            image_mean=mean,
            image_std=std,
        )
        model = CosineHeadModel(config)
        name, mode = "positional_embedding", model.image_encoder.position_mode
        resized = resize_positional_embedding(weights.visual[name], (side, side), mode)
        towers = {"image_encoder": weights.visual | {name: resized}, "text_encoder": weights.text}
        state_dict = model.state_dict() | {
            f"{tower}.{key}": value for tower, held in towers.items() for key, value in held.items()
        }
        load_weights(model, state_dict, architecture="CLIP")
        return model.eval()
