"""Training-free dense CLIP: CLIP with a dense head, compared with text.

The heads are described in :mod:`zsseg_rt.networks.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import LabelRule, PixelModel, ScoreActivation, SegmentationOutput
from zsseg_rt.models.clip.towers import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
    TextEncoder,
    TextEncoderConfig,
)
from zsseg_rt.models.clip.weights import image_config, text_config
from zsseg_rt.models.functional import check_text_embeds, patch_text_similarity
from zsseg_rt.models.sliding import SlideSettings
from zsseg_rt.networks import heads
from zsseg_rt.networks.aggregating import (
    RULES_OF_OUTLIERS,
    SHIPPED_LAYERS,
    AggregationConfig,
    OutlierRule,
)
from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.networks.heads import LOGIT_SCALES
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.on_torch import OnTorch
from zsseg_rt.torch_files.checkpoints import check_float32, load_weights
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD
from zsseg_rt.torch_files.clip_weights import (
    Activation,
    ClipSource,
    ClipWeights,
    Colour,
    normalisation_of,
    random_clip,
    split_towers,
)
from zsseg_rt.torch_files.shipped_clip import is_shipped
from zsseg_rt.torch_files.weights import unwrap

Head = Literal["vanilla", "maskclip", "sclip", "clearclip", "naclip", "sfp", "sc_clip"]
HEADS: tuple[Head, ...] = get_args(Head)
Position = Literal["as_published", "size"]


class TensorOperations(Arrays):
    """Operations on tensors of any floating dtype; constants take that of what they meet."""

    def __init__(self) -> None:
        super().__init__(xp=_Tensors(torch))


class _Tensors(OnTorch):
    def asarray(self, value: Any, like: Any) -> Any:
        """See :meth:`OnTorch.asarray`."""
        made = super().asarray(value, like)
        both = made.is_floating_point() and like.is_floating_point()
        return made.to(like.dtype) if both else made

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Products in the wider dtype."""
        wide = torch.promote_types(a.dtype, b.dtype)
        return torch.matmul(a.to(wide), b.to(wide))


class DenseImageEncoder(ImageEncoder):
    """CLIP's image tower with a dense head; the positional embedding is resized bicubically.

    Args:
        config: Sizes.
        head: One of :data:`zsseg_rt.networks.heads.HEADS`.
        **options: Those of :func:`zsseg_rt.networks.heads.dense_embeds`.
    """

    position_mode: ClassVar[Interpolation] = "bicubic"

    def __init__(self, config: ImageEncoderConfig, head: Head = "naclip", **options: Any) -> None:
        super().__init__(config)
        self.head_name, self.options = head, options
        if "aggregation" in options:
            options["aggregation"].check_depth(config.num_layers)

    def parts(self) -> dict[str, Any]:
        """What a tower of networks is made of; weights stay where they are."""
        config = self.config
        tensors = dict(self.named_parameters())
        return {"tensors": tensors, "num_heads": config.num_heads, "activation": config.activation}

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode images.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            The head's patch embeddings, and CLIP's own class embedding, which no head changes;
            unit norm.
        """
        self.check_image(image)
        ops, tower = TensorOperations(), ImageTower(**self.parts())
        patches = heads.dense_embeds(ops, tower, image, self.head_name, **self.options)
        return ImageEmbeds(patches, heads.class_embed(ops, tower))


@dataclass(frozen=True, kw_only=True)
class DenseCLIPConfig:
    """Everything that defines a dense CLIP model besides its weights.

    Attributes:
        image_encoder: Image tower.
        text_encoder: Text tower, or None for a model that is given text embeddings only.
        head: What the last block becomes.
        size_hw: Input size in pixels that a bundle is built for; the model itself takes any size.
        logit_scale: Multiplies the cosine similarity.
        unknown_below: Probability below which a pixel is unknown in a bundle; None keeps all.
        prior_std: Standard deviation of NACLIP's prior, in patches.
        aggregation: Settings of SFP and SC-CLIP.
        position: How the positional embedding is resized: by ``"size"``, or ``"as_published"``;
            see :func:`zsseg_rt.models.clip.towers.resize_positional_embedding`.
        templates: Prompts with one ``{}`` each; None is the 80 ImageNet prompts of CLIP.
        image_mean: Mean of R, G, B, in ``[0, 1]``.
        image_std: Standard deviation of R, G, B, in ``[0, 1]``.
    """

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text_encoder: TextEncoderConfig | None = None
    head: Head = "naclip"
    size_hw: tuple[int, int] = (448, 448)
    logit_scale: float = 40.0
    unknown_below: float | None = None
    prior_std: float = 5.0
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    position: Position = "size"
    templates: tuple[str, ...] | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        for name in ("logit_scale", "prior_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{name}: expected a number above 0, got {value}. Change it.")
        if self.unknown_below is not None and not 0 <= self.unknown_below <= 1:
            raise ArgumentError(
                f"unknown_below: expected a probability in [0, 1], got {self.unknown_below}. "
                "Use None to keep every pixel."
            )
        check_choice("position", self.position, get_args(Position))
        check_size(self.size_hw, self.image_encoder.patch_size)


class DenseCLIP(PixelModel):
    """CLIP that labels patches by comparing their embeddings with text embeddings.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`.

    Attributes:
        image_mean: Mean of R, G, B, in ``[0, 1]``.
        image_std: Standard deviation of R, G, B, in ``[0, 1]``.
    """

    architecture = "dense_clip"
    predicts_logits: ClassVar[bool] = True
    config: DenseCLIPConfig

    def __init__(self, config: DenseCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.image_encoder = self._make_encoder()
        self.text_encoder = self._make_text_encoder()

    def _make_text_encoder(self) -> nn.Module | None:
        config = self.config.text_encoder
        return None if config is None else TextEncoder(config)

    def _make_encoder(self) -> ImageEncoder:
        config = self.config
        options: dict[str, Any] = {"position": config.position}
        if config.head in RULES_OF_OUTLIERS:
            options["aggregation"] = config.aggregation
        elif config.head == "naclip":
            options["prior_std"] = config.prior_std
        return DenseImageEncoder(config.image_encoder, config.head, **options)

    @property
    def description(self) -> str:
        """A human-readable name of the model."""
        return f"dense_clip {self.config.head}"

    @property
    def size_hw(self) -> tuple[int, int]:
        """The configured input size in pixels."""
        return self.config.size_hw

    @property
    def windows(self) -> SlideSettings:
        """The authors' default for most data sets; on the others they take the whole image."""
        side = min(self.config.size_hw)
        whole = SlideSettings(short_side=side, crop_size=side, stride=side // 2)
        return _WINDOWS.get(self.config.head, whole)

    @property
    def label_rule(self) -> LabelRule:
        """See :attr:`PixelModel.label_rule`."""
        return LabelRule(
            activation=self.score_activation,
            seen_classes=self.seen_classes,
            seen_bias=self.seen_bias,
            unknown_below=self.config.unknown_below,
        )

    @property
    def logit_scale(self) -> Tensor | float:
        """The factor on cosine similarities."""
        return self.config.logit_scale

    @property
    def score_activation(self) -> ScoreActivation:
        """What turns logits into probabilities."""
        return "softmax"

    @property
    def seen_classes(self) -> tuple[int, ...]:
        """Rows of the text embeddings whose probabilities are lowered."""
        return ()

    @property
    def seen_bias(self) -> float:
        """How much these probabilities are lowered."""
        return 0.0

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compare every patch with every class.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A remainder below one patch at the right and the bottom is ignored.
            text_embeds: Class embeddings, ``[C, D]``; brought to the image's dtype and unit norm.

        Returns:
            Cosine similarities times ``logit_scale``, the head's patch embeddings, and CLIP's own
            image embedding.
        """
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        patch_embeds, cls_embed = self.image_encoder(image)
        similarity = patch_text_similarity(patch_embeds, text_embeds.to(patch_embeds))
        mask_logits = self.logit_scale * similarity
        grid_hw = self.image_encoder.grid_hw((image.shape[2], image.shape[3]))
        return SegmentationOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=cls_embed,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits of every class at every pixel: those of the patches, upsampled bilinearly.

        :func:`zsseg_rt.models.slide_predict` averages them over windows and ends with the softmax:
        ``slide_predict(model, rgb, text_embeds, short_side=336, crop_size=224, stride=112)`` is
        SCLIP's and NACLIP's protocol; a ``crop_size`` above both sides takes the whole image.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``.

        Returns:
            ``[B, C, H, W]``, before the softmax.
        """
        logits = self(image, text_embeds).mask_logits
        size_hw = (image.shape[2], image.shape[3])
        return F.interpolate(logits, size=size_hw, mode="bilinear", align_corners=False)


_WINDOWS: Mapping[Head, SlideSettings] = {
    "clearclip": SlideSettings(short_side=448, crop_size=448, stride=224),
    **{
        head: SlideSettings(short_side=336, crop_size=224, stride=112)
        for head in ("naclip", "sclip", "sfp", "sc_clip")
    },
}


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What can be chosen about a dense head, whatever its weights come from.

    Attributes:
        head: ``"naclip"``, ``"clearclip"``, ``"sclip"``, ``"maskclip"``, ``"vanilla"``, ``"sfp"``
            or ``"sc_clip"``.
        image_size: Input size in pixels that a bundle is built for, a side or (height, width);
            None is the size the weights were trained at.
        logit_scale: Multiplies the cosine similarity; None is the authors': 50 for ClearCLIP, 100
            for MaskCLIP and vanilla, 40 for the others.
        unknown_below: Probability below which a pixel is unknown in a bundle.
        templates: Prompts with one ``{}`` each; None is the 80 ImageNet prompts of CLIP.
        prior_std: Standard deviation of NACLIP's prior, in patches.
        image_mean: Mean of R, G, B, in ``[0, 1]``; None is the weights'.
        image_std: Standard deviation of R, G, B, in ``[0, 1]``; None is the weights'.
        position: How the positional embedding is resized; see :class:`DenseCLIPConfig`.
        pm: For SFP and SC-CLIP, like all that follow: how outliers are found; see
            :class:`zsseg_rt.networks.aggregating.AggregationConfig`.
        r: See there.
        beta: See there.
        pre: See there; None is the official number, or one that fits the CLIP that ships.
        post: See ``pre``.
        first: See ``pre``.
        end: See ``pre``.
    """

    head: Head = "naclip"
    image_size: int | tuple[int, int] | None = None
    logit_scale: float | None = None
    unknown_below: float | None = None
    templates: Sequence[str] | None = None
    prior_std: float = 5.0
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    position: Position = "size"
    pm: OutlierRule | None = None
    r: float = 0.3
    beta: float = 0.4
    pre: int | None = None
    post: int | None = None
    first: int | None = None
    end: int | None = None

    def config(self, layers: Mapping[str, int]) -> dict[str, Any]:
        """The fields of :class:`DenseCLIPConfig` that follow, checked; ``layers`` are defaults."""
        given = {name: getattr(self, name) for name in ("pre", "post", "first", "end")}
        given = dict(layers) | {name: value for name, value in given.items() if value is not None}
        scale = self.logit_scale
        if scale is None:
            scale = LOGIT_SCALES.get(self.head, 1.0)
        settings: dict[str, Any] = {
            "head": self.head,
            "prior_std": self.prior_std,
            "logit_scale": scale,
            "unknown_below": self.unknown_below,
            "templates": None if self.templates is None else tuple(self.templates),
            "aggregation": AggregationConfig(pm=self.pm, r=self.r, beta=self.beta, **given),
            "position": self.position,
        }
        DenseCLIPConfig(**settings)  # refuse bad settings before weights are read
        return settings

    def assemble(
        self, weights: ClipWeights, colours: tuple[Colour, Colour], settings: Mapping[str, Any]
    ) -> DenseCLIP:
        """Make the model, in evaluation mode, with no trainable parameters."""
        encoder = image_config(weights)
        text, state_dict = None, {f"image_encoder.{key}": v for key, v in weights.visual.items()}
        if weights.text:
            text = text_config(weights)
            state_dict |= {f"text_encoder.{key}": value for key, value in weights.text.items()}
        side = encoder.side if self.image_size is None else self.image_size
        config = DenseCLIPConfig(
            image_encoder=encoder,
            text_encoder=text,
            size_hw=side if isinstance(side, tuple) else (side, side),
            image_mean=self.image_mean or colours[0],
            image_std=self.image_std or colours[1],
            **settings,
        )
        with torch.device("meta"):
            model = DenseCLIP(config)
        load_weights(model, state_dict, architecture="CLIP")
        return model.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class DenseCLIPStart(HeadSettings, ClipSource):
    """Builds dense CLIP from CLIP weights; nothing is trained.

    Attributes:
        pretrained: As of :class:`ClipSource`; None is open_clip's random initialisation.
        with_text_encoder: Whether to build the text tower.
    """

    pretrained: str | Path | None = None
    with_text_encoder: bool = True

    def build(self) -> DenseCLIP:
        """Make the model, in evaluation mode, with no trainable parameters."""
        shipped = self.pretrained is not None and is_shipped(self.pretrained)
        settings = self.config(SHIPPED_LAYERS if shipped else {})
        colours = CLIP_MEAN, CLIP_STD
        if self.pretrained is None:
            weights = random_clip(self.clip)
        else:
            weights = self.load()
            colours = normalisation_of(self.pretrained, self.clip)
        if not self.with_text_encoder:
            weights = replace(weights, text={})
        return self.assemble(weights, colours, settings)


@dataclass(frozen=True, kw_only=True)
class OfficialDenseCLIP(HeadSettings):
    """Builds dense CLIP from the weights of CLIP's image tower, or of both towers.

    Attributes:
        logit_scale: Multiplies the cosine similarity; 1 gives cosines.
        position: How the positional embedding is resized; see :class:`DenseCLIPConfig`.
        num_heads: Heads of the image tower; None is one per 64 channels.
        text_heads: Heads of the text tower; None is one per 64 channels.
        activation: ``"quick_gelu"`` for OpenAI's weights, ``"gelu"`` for most others.
    """

    logit_scale: float | None = 1.0
    position: Position = "as_published"
    num_heads: int | None = None
    text_heads: int | None = None
    activation: Activation = "quick_gelu"

    def build(self, state_dict: Mapping[str, Tensor]) -> DenseCLIP:
        """Make the model, in evaluation mode.

        Args:
            state_dict: Float32: the image tower's own keys, ``conv1.weight`` and so on, or the keys
                of a whole CLIP, by open_clip or transformers, with what wrappers put in front.

        Raises:
            CheckpointError: Keys are missing, unknown or of another shape or dtype.
        """
        settings = self.config({})
        kept = {k: v for k, v in state_dict.items() if not k.endswith("position_ids")}
        state_dict = unwrap(kept)
        check_float32(state_dict, "CLIP")
        if "conv1.weight" not in state_dict:
            weights = split_towers(state_dict, self.activation, "state_dict")
        else:
            weights = ClipWeights(visual=dict(state_dict), text={}, activation=self.activation)
        weights = replace(weights, num_heads=self.num_heads, text_heads=self.text_heads)
        return self.assemble(weights, (CLIP_MEAN, CLIP_STD), settings)
