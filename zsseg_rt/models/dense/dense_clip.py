"""Dense CLIP: CLIP with a dense head, compared with text, training-free or fine-tuned; and TIPSv2.

Modules hold weights and check images; the networks are in :mod:`zsseg_rt.networks`. The cosine head
is the fine-tuned form: image tower, a linear head that starts as the identity, and the logit scale
are trained.

Source:
    For TIPS google-deepmind/tips, PyTorch part, commit 4db271d, and its notebook for zero-shot
    segmentation; for heads see :mod:`zsseg_rt.networks.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice, check_range, check_size
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    SegmentationOutput,
    SlideSettings,
    check_rgb,
    lower_seen,
    slide_scores,
)
from zsseg_rt.models.clip.towers import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
    TextEncoder,
    TextEncoderConfig,
    Transformer,
    unit,
)
from zsseg_rt.models.clip.weights import (
    ClipActivation,
    ClipSource,
    by_tower,
    clip_of_tensors,
    image_config,
    load_into,
    random_clip,
    start_from_clip,
    text_config,
)
from zsseg_rt.models.functional import check_text_embeds, patch_text_similarity, shared_fields
from zsseg_rt.networks import heads, tips
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
from zsseg_rt.torch_files.checkpoints import check_float32
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD, ClipTensors, Tower, is_shipped
from zsseg_rt.torch_files.clip_layouts import Settings
from zsseg_rt.torch_files.tips_weights import (
    PATCH,
    TEMPLATES,
    TipsTensors,
    heads_of,
    read_tips,
    sort_tips,
)
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
        tensor = super().asarray(value, like)
        both = tensor.is_floating_point() and like.is_floating_point()
        return tensor.to(like.dtype) if both else tensor

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, b.dtype)
        return torch.matmul(a.to(wide), b.to(wide))


class DenseImageEncoder(ImageEncoder):
    """CLIP's image tower with a dense head; the positional embedding is resized bicubically."""

    position_mode: ClassVar[Interpolation] = "bicubic"

    def __init__(self, config: ImageEncoderConfig, head: Head = "naclip", **options: Any) -> None:
        super().__init__(config)
        self.head_name, self.options = head, options
        if "aggregation" in options:
            options["aggregation"].check_depth(config.num_layers)

    def parts(self) -> dict[str, Any]:
        """Parts of a tower of networks; weights stay where they are."""
        config = self.config
        tensors = dict(self.named_parameters())
        return {"tensors": tensors, "num_heads": config.num_heads, "activation": config.activation}

    def forward(self, image: Tensor) -> ImageEmbeds:
        """The head's patch embeddings, and CLIP's own class embedding, which no head changes."""
        self.check_image(image)
        ops, tower = TensorOperations(), ImageTower(**self.parts())
        patches = heads.dense_embeds(ops, tower, image, self.head_name, **self.options)
        return ImageEmbeds(patches, heads.class_embed(ops, tower))


@dataclass(frozen=True, kw_only=True)
class DenseCLIPConfig:
    """Everything that defines a dense CLIP model besides its weights."""

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)  # Image tower
    # Text tower, or None for a model that is given text embeddings only
    text_encoder: TextEncoderConfig | None = None
    head: Head = "naclip"  # What the last block becomes
    # Input size in pixels that a bundle is built for; the model itself takes any size
    size_hw: tuple[int, int] = (448, 448)
    logit_scale: float = 40.0  # Multiplies the cosine similarity
    # Probability below which a pixel is unknown in a bundle; None keeps all
    unknown_below: float | None = None
    # Settings of SFP and SC-CLIP
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    # How the positional embedding is resized: by "size", or "as_published"; see
    # resize_positional_embedding
    position: Position = "size"
    # Prompts with one {} each; None is the 80 ImageNet prompts of CLIP
    templates: tuple[str, ...] | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN  # Mean of R, G, B, in [0, 1]
    image_std: tuple[float, float, float] = CLIP_STD  # Standard deviation of R, G, B, in [0, 1]

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        if not 0 < self.logit_scale < math.inf:
            raise ArgumentError(
                f"logit_scale: expected a number above 0, got {self.logit_scale}. Change it."
            )
        check_range(self, "unknown_below", most=1)
        check_choice("position", self.position, get_args(Position))
        check_size(self.size_hw, self.image_encoder.patch_size)


class DenseCLIP(PixelModel):
    """CLIP that labels patches by comparing their embeddings with text embeddings.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`.
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
        return DenseImageEncoder(config.image_encoder, config.head, **options)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.config.size_hw

    @property
    def windows(self) -> SlideSettings:
        """The authors' default for most data sets; on the others they take the whole image."""
        side = min(self.config.size_hw)
        whole = SlideSettings(short_side=side, crop_size=side, stride=side // 2)
        return _WINDOWS.get(self.config.head, whole)

    @property
    def label_rule(self) -> LabelRule:
        return LabelRule(activation="softmax", unknown_below=self.config.unknown_below)

    @property
    def logit_scale(self) -> Tensor | float:
        return self.config.logit_scale

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compare every patch with every class.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A remainder below one patch at the right and the bottom is ignored.
            text_embeds: Class embeddings, ``[C, D]``; brought to the image's dtype and unit norm.
        """
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        patch_embeds, cls_embed, _ = self.image_encoder(image)
        similarity = patch_text_similarity(patch_embeds, text_embeds.to(patch_embeds))
        mask_logits = self.logit_scale * similarity
        grid_hw = self.image_encoder.grid_hw((image.shape[2], image.shape[3]))
        return SegmentationOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=cls_embed,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits of every class at every pixel, ``[B, C, H, W]``: the patches', upsampled.

        ``slide_predict(model, rgb, text_embeds, short_side=336, crop_size=224, stride=112)`` is
        SCLIP's and NACLIP's protocol; a ``crop_size`` above both sides takes the whole image.
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


def colours_of(weights: ClipTensors) -> dict[str, Any]:
    """The mean and standard deviation of images that weights were trained with, as settings."""
    settings = weights.settings
    return {"image_mean": settings.mean or CLIP_MEAN, "image_std": settings.std or CLIP_STD}


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Settings of a dense head, whatever its weights come from."""

    # "naclip", "clearclip", "sclip", "maskclip", "vanilla", "sfp" or "sc_clip"
    head: Head = "naclip"
    # Input size in pixels that a bundle is built for, a side or (height, width); None is the size
    # the weights were trained at
    image_size: int | tuple[int, int] | None = None
    # Multiplies the cosine similarity; None is the authors': 50 for ClearCLIP, 100 for MaskCLIP and
    # vanilla, 40 for the others
    logit_scale: float | None = None
    unknown_below: float | None = None  # Probability below which a pixel is unknown in a bundle
    # Prompts with one {} each; None is the 80 ImageNet prompts of CLIP
    templates: Sequence[str] | None = None
    # How the positional embedding is resized; see DenseCLIPConfig
    position: Position = "size"
    # For SFP and SC-CLIP, like all that follow: how outliers are found; see AggregationConfig
    pm: OutlierRule | None = None
    r: float = 0.3  # See AggregationConfig
    beta: float = 0.4  # See AggregationConfig
    # See AggregationConfig; None is the official number, or one that fits the CLIP that ships
    pre: int | None = None
    post: int | None = None  # See pre
    first: int | None = None  # See pre
    end: int | None = None  # See pre

    def config(self, layers: Mapping[str, int]) -> dict[str, Any]:
        """The fields of :class:`DenseCLIPConfig` that follow, checked; ``layers`` are defaults."""
        own = {name: getattr(self, name) for name in ("pre", "post", "first", "end")}
        layers = dict(layers) | {name: value for name, value in own.items() if value is not None}
        settings: dict[str, Any] = {"logit_scale": LOGIT_SCALES.get(self.head, 1.0)}
        settings |= shared_fields(self, DenseCLIPConfig)
        settings["aggregation"] = AggregationConfig(pm=self.pm, r=self.r, beta=self.beta, **layers)
        DenseCLIPConfig(**settings)  # refuse bad settings before weights are read
        return settings

    def assemble(self, weights: ClipTensors, settings: Mapping[str, Any]) -> DenseCLIP:
        """Make the model, in evaluation mode, with no trainable parameters."""
        encoder = image_config(weights)
        side = encoder.side if self.image_size is None else self.image_size
        fields: dict[str, Any] = {
            "image_encoder": encoder,
            "text_encoder": text_config(weights) if weights.text else None,
            "size_hw": side if isinstance(side, tuple) else (side, side),
        } | colours_of(weights)
        config = DenseCLIPConfig(**fields | dict(settings))
        tensors: dict[str, Any] = by_tower(
            {"image_encoder": weights.visual, "text_encoder": weights.text}
        )
        model = load_into(DenseCLIP, config, tensors, architecture="CLIP")
        return model.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class DenseCLIPStart(HeadSettings, ClipSource):
    """Builds dense CLIP from CLIP weights; nothing is trained."""

    # As of ClipSource; None is open_clip's random initialisation
    pretrained: str | Path | None = None

    def build(self) -> DenseCLIP:
        shipped = self.pretrained is not None and is_shipped(self.pretrained)
        settings = self.config(SHIPPED_LAYERS if shipped else {})
        weights = random_clip(self.clip) if self.pretrained is None else self.load()
        return self.assemble(weights, settings)


@dataclass(frozen=True, kw_only=True)
class OfficialDenseCLIP(HeadSettings):
    """Builds dense CLIP from the weights of CLIP's image tower, or of both towers."""

    logit_scale: float | None = 1.0  # Multiplies the cosine similarity; 1 gives cosines
    # How the positional embedding is resized; see DenseCLIPConfig
    position: Position = "as_published"
    num_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    # "quick_gelu" for OpenAI's weights, "gelu" for most others
    activation: ClipActivation = "quick_gelu"

    def build(self, state_dict: Mapping[str, Tensor]) -> DenseCLIP:
        """Make the model, in evaluation mode, with no trainable parameters."""
        settings = self.config({})
        tensors = {k: v for k, v in state_dict.items() if not k.endswith("position_ids")}
        state_dict = unwrap(tensors)
        check_float32(state_dict, "CLIP")
        if "conv1.weight" in state_dict:
            weights = ClipTensors(visual=Tower(state_dict), text=Tower({}))
        else:
            weights = clip_of_tensors(state_dict, "state_dict")
        own = Settings(self.activation, self.num_heads, self.text_heads)
        return self.assemble(replace(weights, settings=own), settings)


@dataclass(frozen=True, kw_only=True)
class CosineHeadConfig(DenseCLIPConfig):
    """Everything that defines the cosine head besides its weights."""

    head: Head = "vanilla"  # "vanilla": the last block is unchanged
    # Initial value of the trained scale; the default is CLIP's own start
    logit_scale: float = 1 / 0.07
    # Rows of the text embeddings whose classes were trained on; their scores are lowered by
    # seen_bias
    seen_classes: tuple[int, ...] = ()
    seen_bias: float = 0.0  # How much they are lowered, as a probability; 0 lowers none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head != "vanilla":
            raise ArgumentError(
                f"head: expected 'vanilla', got {self.head!r}. Only the plain last block is "
                "trained; for another head use dense_clip."
            )
        check_range(self, "seen_bias", most=1)


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
    def crop_hw(self) -> tuple[int, int]:
        return self.config.size_hw

    @property
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    @property
    def label_rule(self) -> LabelRule:
        config = self.config
        return LabelRule(
            activation="softmax",
            seen_classes=config.seen_classes if config.seen_bias else (),
            seen_bias=config.seen_bias,
            unknown_below=config.unknown_below,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Probabilities, lowered by ``seen_bias`` for seen classes, ``[B, C, H, W]``."""
        scores = super().predict(image, text_embeds).softmax(dim=1)
        return lower_seen(scores, self.label_rule.seen_classes, self.config.seen_bias)


@dataclass(frozen=True, kw_only=True)
class CosineHeadStart(ClipSource):
    """Starts as dense CLIP's vanilla head, positions resized to ``image_size`` (bicubic)."""

    image_size: int = 512  # Side of training crops and of a bundle's input, in pixels
    logit_scale: float = 1 / 0.07  # Initial value of the trained scale
    seen_classes: Sequence[int] = ()  # Rows of the text embeddings that are trained on
    # See CosineHeadConfig
    seen_bias: float = 0.0
    # Prompts with one {} each; None is the 80 ImageNet prompts of CLIP
    templates: Sequence[str] | None = None

    def build(self) -> CosineHeadModel:
        weights = self.load()
        encoder = image_config(weights)
        size_hw = (self.image_size, self.image_size)
        check_size(size_hw, encoder.patch_size)
        config = CosineHeadConfig(
            image_encoder=replace(encoder, grid_side=self.image_size // encoder.patch_size),
            text_encoder=text_config(weights),
            size_hw=size_hw,
            **colours_of(weights),
            **shared_fields(self, CosineHeadConfig),
        )
        return start_from_clip(CosineHeadModel(config), weights)


# --- TIPSv2 ---


def _tips_config() -> ImageEncoderConfig:
    return ImageEncoderConfig(
        embed_dim=768, patch_size=PATCH, activation="gelu", num_prompts=0, num_deep_prompts=0
    )


@dataclass(frozen=True, kw_only=True)
class TipsConfig(DenseCLIPConfig):
    """Everything that defines a TIPS model besides its weights; the defaults are B/14's."""

    image_encoder: ImageEncoderConfig = field(default_factory=_tips_config)
    head: Head = "maskclip"  # "maskclip", the authors' head
    # Multiplies the cosine similarity; 1 gives cosines, as the authors evaluate
    logit_scale: float = 1.0
    templates: tuple[str, ...] | None = TEMPLATES
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # 0: images are in [0, 1]
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # 1, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head != "maskclip":
            raise ArgumentError(
                f"head: expected 'maskclip', the only one known for TIPS, got {self.head!r}. "
                "Leave it out."
            )


class TipsImageEncoder(DenseImageEncoder):
    """DINOv2's ViT with a register token: no norm before the blocks, no projection behind."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config, "maskclip")
        width = config.width
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.register_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.ln_pre = cast(nn.LayerNorm, nn.Identity())
        del self.proj

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid of an image, whose sides must be multiples of the patch size."""
        patch = self.config.patch_size
        if min(size_hw) < 1 or any(side % patch for side in size_hw):
            raise ShapeError(
                f"image: expected sides that are multiples of {patch}, got "
                f"{size_hw[0]}x{size_hw[1]}. Resize it; the authors stretch to the next multiple."
            )
        return super().grid_hw(size_hw)

    def forward(self, image: Tensor) -> ImageEmbeds:
        self.check_image(image)
        if not torch.isfinite(image).all():
            raise ArgumentError(
                "image: expected finite numbers in [0, 1], got NaN or infinity. Check the image."
            )
        ops, tower = TensorOperations(), tips.TipsImage(**self.parts())
        patches = tips.dense_embeds(ops, tower, image)
        return ImageEmbeds(patches, tips.class_embed(ops, tower))


class TipsTextEncoder(nn.Module):
    """TIPS's text tower: tokens see each other, and their mean is the embedding."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ids ``[T, L]`` padded with ``vocab_size``, ``[T, W]``, **not** normalised."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise DTypeError(
                f"tokens: expected integer ids [T, L], got {tokens.dtype} {list(tokens.shape)}. "
                "Use PieceTokenizer.encode."
            )
        tensors: Any = dict(self.named_parameters())
        tower = tips.TipsText(tensors=tensors, num_heads=self.config.num_heads)
        return cast(Tensor, tower.embed(TensorOperations(), tokens))


class Tips(DenseCLIP):
    """TIPSv2 as a model: images are RGB in ``[0, 1]``, sides multiples of 14."""

    architecture = "tips"
    predicts_logits: ClassVar[bool] = False
    config: TipsConfig

    def _make_encoder(self) -> TipsImageEncoder:
        return TipsImageEncoder(self.config.image_encoder)

    def _make_text_encoder(self) -> TipsTextEncoder | None:
        config = self.config.text_encoder
        return None if config is None else TipsTextEncoder(config)

    @property
    def windows(self) -> SlideSettings:
        """The authors': windows of the input's size, three quarters of it apart."""
        side = min(self.config.size_hw)
        return SlideSettings(short_side=side, crop_size=side, stride=side * 3 // 4)

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Probabilities at every pixel of images in [0, 1], as the authors average over windows."""
        return super().predict(image, text_embeds).softmax(dim=1)

    def slide_views(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings
    ) -> Tensor:
        """The authors' protocol for whole images, ``[C, H, W]``: mean probabilities of windows."""
        image = torch.from_numpy(resized_rgb(rgb, windows.short_side)).float().div(255)
        image = image[None].to(self.image_encoder.conv1.weight.device)
        scores = slide_scores(
            lambda window: self.predict(window, text_embeds),
            image,
            crop_size=windows.crop_size,
            stride=windows.stride,
        )
        return F.interpolate(scores, size=rgb.shape[:2], mode="bilinear", align_corners=False)[0]


def resized_rgb(rgb: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Resize by Pillow's bicubic; the long side is cut to whole pixels. uint8 ``[3, h, w]``."""
    from PIL import Image

    check_rgb(rgb)
    height, width = rgb.shape[:2]
    shorter = min(height, width)
    size_wh = (int(short_side * width / shorter), int(short_side * height / shorter))
    resized = Image.fromarray(rgb).resize(size_wh, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


@dataclass(frozen=True, kw_only=True)
class OfficialTips:
    """Builds TIPSv2 B/14 or L/14 from the authors' weights; sizes are read from shapes."""

    num_heads: int | None = None  # Heads of the image tower; None is the published number
    text_heads: int | None = None  # Heads of the text tower; None is the published number
    # Input size in pixels that a bundle is built for, a side or (height, width); None is the size
    # the positions are stored for (448)
    image_size: int | tuple[int, int] | None = None
    # Multiplies the cosine similarity; None is one over the stored temperature
    logit_scale: float | None = 1.0
    unknown_below: float | None = None  # Probability below which a pixel is unknown in a bundle
    templates: Sequence[str] | None = None  # Prompts with one {} each; None is the authors' nine

    def build(self, state_dict: Mapping[str, Mapping[str, Any]]) -> Tips:
        """Make the model, in evaluation mode, with no trainable parameters.

        ``state_dict`` has ``"vision"`` and, for a text tower, ``"text"``: official keys with
        float32 tensors or arrays, as the two ``.npz`` files hold them.
        """
        unknown = [key for key in state_dict if key not in ("vision", "text")]
        if unknown or "vision" not in state_dict:
            raise CheckpointError(
                "state_dict: expected the towers 'vision' and 'text', got "
                f"{', '.join(list(state_dict)[:5])[:200] or 'none'}. Pass {{'vision': ..., "
                "'text': ...}}, each as its .npz file holds it."
            )
        return self.assemble(sort_tips(state_dict["vision"], state_dict.get("text", {})))

    def assemble(self, weights: TipsTensors) -> Tips:
        """The same from weights that were read and sorted."""
        scale = self.logit_scale
        if scale is None:
            scale = 1.0 if weights.temperature is None else 1 / weights.temperature
        side = weights.grid_side * PATCH if self.image_size is None else self.image_size
        fields: dict[str, Any] = {
            "image_encoder": self._image_config(weights),
            "text_encoder": self._text_config(weights) if weights.text else None,
            "size_hw": side if isinstance(side, tuple) else (side, side),
            "logit_scale": scale,
        }
        config = TipsConfig(**shared_fields(self, TipsConfig) | fields)
        arrays = by_tower({"image_encoder": weights.visual, "text_encoder": weights.text})
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        return load_into(Tips, config, tensors, architecture="TIPS").requires_grad_(False)

    def _image_config(self, weights: TipsTensors) -> ImageEncoderConfig:
        return replace(
            _tips_config(),
            num_heads=heads_of("num_heads", self.num_heads, weights.width),
            embed_dim=weights.width,
            grid_side=weights.grid_side,
            **_sizes(weights.visual),
        )

    def _text_config(self, weights: TipsTensors) -> TextEncoderConfig:
        return TextEncoderConfig(
            vocab_size=len(weights.text["token_embedding.weight"]),
            context_length=tips.CONTEXT_LENGTH,
            num_heads=heads_of("text_heads", self.text_heads, weights.width),
            embed_dim=weights.width,
            activation="relu",
            **_sizes(weights.text),
        )


def _sizes(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Fields of both towers' configurations."""
    last = "mlp.c_proj.weight"
    shapes = [value.shape for key, value in tensors.items() if key.endswith(last)]
    width, mlp_width = shapes[0]
    return {"width": width, "mlp_width": mlp_width, "num_layers": len(shapes)}


@dataclass(frozen=True, kw_only=True)
class TipsStart(OfficialTips):
    """Builds TIPSv2 from the authors' files; nothing is trained."""

    vision: str | Path  # tips_v2_oss_b14_vision.npz or its like
    text: str | Path | None = None  # The text tower's file of the same size; None builds none

    def build(self) -> Tips:  # type: ignore[override]
        return self.assemble(read_tips(self.vision, self.text))
