"""TIPSv2: an image-text backbone whose patches compare with text, in torch.

Source:
    google-deepmind/tips, PyTorch part, commit 4db271d, and its notebook for zero-shot segmentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models.base import SlideSettings, check_rgb, slide_scores
from zsseg_rt.models.clip.towers import (
    ImageEmbeds,
    ImageEncoderConfig,
    TextEncoderConfig,
    Transformer,
)
from zsseg_rt.models.clip.weights import by_tower, load_into
from zsseg_rt.models.dense.dense_clip import (
    DenseCLIP,
    DenseCLIPConfig,
    DenseImageEncoder,
    Head,
    TensorOperations,
)
from zsseg_rt.models.functional import shared_fields
from zsseg_rt.networks import tips
from zsseg_rt.torch_files.tips_weights import (
    PATCH,
    TEMPLATES,
    TipsTensors,
    heads_of,
    read_tips,
    sort_tips,
)


def _image_config() -> ImageEncoderConfig:
    return ImageEncoderConfig(
        embed_dim=768, patch_size=PATCH, activation="gelu", num_prompts=0, num_deep_prompts=0
    )


@dataclass(frozen=True, kw_only=True)
class TipsConfig(DenseCLIPConfig):
    """Everything that defines a TIPS model besides its weights; the defaults are B/14's."""

    image_encoder: ImageEncoderConfig = field(default_factory=_image_config)
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
        """Encode images; see :meth:`DenseImageEncoder.forward`."""
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
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.transformer = Transformer(
            width, config.num_layers, config.num_heads, config.mlp_width, config.activation
        )
        self.ln_final = nn.LayerNorm(width)

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
            _image_config(),
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
        """Make the model, in evaluation mode, with no trainable parameters."""
        return self.assemble(read_tips(self.vision, self.text))
