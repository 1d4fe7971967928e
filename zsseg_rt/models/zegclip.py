"""ZegCLIP: CLIP with deep visual prompts, a relationship descriptor and a mask decoder.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout. Decoder tensors that no forward pass reads (``self_attn.*``, ``norm1.*``) do not
exist here.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ShapeError
from zsseg_rt.models.checkpoints import Sizes, check_float32, load_weights
from zsseg_rt.models.clip import (
    ClipWeights,
    image_encoder_config,
    load_clip,
    text_encoder_config,
)
from zsseg_rt.models.functional import relationship_descriptor
from zsseg_rt.models.image_encoder import (
    FoldedImageEncoder,
    ImageEncoderConfig,
    PromptedImageEncoder,
    resize_positional_embedding,
)
from zsseg_rt.models.mask_decoder import DecoderConfig, FoldedDecoder, MaskDecoder
from zsseg_rt.models.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.models.transformer import Activation

__all__ = [
    "DecodeHead",
    "InferenceParts",
    "SegmentationOutput",
    "ZegCLIP",
    "ZegCLIPConfig",
    "zegclip_from_clip",
    "zegclip_from_official",
]

IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


@dataclass(frozen=True, kw_only=True)
class ZegCLIPConfig:
    """What defines a ZegCLIP model besides its weights; the defaults are VOC's.

    Attributes:
        image_encoder: Image tower.
        decoder: Mask decoder.
        text_encoder: Text tower, or None for a model that is given text embeddings only.
        image_size: Side in pixels that mask logits are upsampled to before the sigmoid, whatever
            the input's size (official ``img_size``).
        seen_classes: Rows of the text embeddings whose classes were trained on; their scores are
            lowered by ``seen_bias``. Empty: no score is lowered.
        self_trained: Whether the weights come from self-training; these scores are not shifted.
        seen_bias: The amount, in probability.
    """

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text_encoder: TextEncoderConfig | None = None
    image_size: int = 512
    seen_classes: tuple[int, ...] = ()
    self_trained: bool = False
    seen_bias: float = 0.1


@dataclass(frozen=True)
class SegmentationOutput:
    """What a forward pass gives.

    Attributes:
        mask_logits: Mask logits at the grid's resolution, ``[B, C, gh, gw]``.
        patch_embeds: Unit-norm patch embeddings, ``[B, D, gh, gw]``.
        cls_embed: Unit-norm image embeddings, ``[B, D]``.
    """

    mask_logits: Tensor
    patch_embeds: Tensor
    cls_embed: Tensor


class DecodeHead(nn.Module):
    """Relationship descriptor and mask decoder.

    Args:
        config: Sizes.
        embed_dim: Width D of the joint space.
    """

    def __init__(self, config: DecoderConfig, embed_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * embed_dim, config.query_dim)
        self.decoder_1 = MaskDecoder(config, embed_dim)

    def forward(self, patch_embeds: Tensor, cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
        """Mask logits.

        Args:
            patch_embeds: ``[B, N, D]``, unit norm.
            cls_embed: ``[B, D]``, unit norm.
            text_embeds: ``[C, D]``, unit norm.

        Returns:
            ``[B, C, N]``.
        """
        queries = relationship_descriptor(
            cls_embed, text_embeds, self.q_proj.weight, self.q_proj.bias
        )
        return self.decoder_1(queries, patch_embeds)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class InferenceParts:
    """A model cut where the runtime's kernels take over.

    ``patch_embeds, cls_embed = image_encoder(image)``;
    ``queries = relationship_descriptor(cls_embed, text_embeds, descriptor_weight,
    descriptor_bias)``; ``class_embeds, patch_keys = decoder(queries, patch_embeds)``;
    ``mask_logits = patch_text_similarity(patch_keys, class_embeds, logit_scale=logit_scale,
    normalize=False)``; then ``upsample_argmax`` with a sigmoid and the seen classes' bias.

    Attributes:
        image_encoder: ``[B, 3, *size_hw]`` to ``patch_embeds`` ``[B, N, D]`` and ``cls_embed``
            ``[B, D]``, unit norm.
        decoder: ``queries`` ``[B, C, E]`` and ``patch_embeds`` to ``class_embeds`` ``[B, C, E]``
            and ``patch_keys`` ``[B, N, E]``.
        text_encoder: ``tokens`` ``[T, L]`` to ``[T, D]``, not normalised; None if there is none.
        descriptor_weight: ``[E, 2D]``.
        descriptor_bias: ``[E]``.
        logit_scale: Factor of the last product.
        grid_hw: Patch grid, rows and columns.
        size_hw: Input size in pixels.
    """

    image_encoder: FoldedImageEncoder
    decoder: FoldedDecoder
    text_encoder: TextEncoder | None
    descriptor_weight: Tensor
    descriptor_bias: Tensor
    logit_scale: float
    grid_hw: tuple[int, int]
    size_hw: tuple[int, int]


class ZegCLIP(nn.Module):
    """The whole model.

    Pictures are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`
    (ImageNet's, not CLIP's). Only the prompts, ``prompt_norm`` and the decode head require
    gradients.

    Args:
        config: Sizes and the evaluation rule.
    """

    image_mean = IMAGE_MEAN
    image_std = IMAGE_STD

    def __init__(self, config: ZegCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = PromptedImageEncoder(config.image_encoder)
        self.decode_head = DecodeHead(config.decoder, config.image_encoder.embed_dim)
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder else None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("decode_head.") or "prompt" in name)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors that training updates; everything else is frozen.

        The last decoder layer's unused tensors are among them, as officially; they never receive
        a gradient.
        """
        return (pair for pair in self.named_parameters() if pair[1].requires_grad)

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compute mask logits at the grid's resolution.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch
                (officially square).
            text_embeds: Class embeddings, ``[C, D]``, unit norm; brought to the image's dtype.

        Returns:
            Mask logits, patch embeddings and class embeddings.

        Raises:
            ShapeError: An argument has another shape.
            DTypeError: The image is not of the weights' dtype.
        """
        self._check_text(text_embeds)
        patch_embeds, cls_embed = self.backbone(image)
        text_embeds = text_embeds.to(patch_embeds)
        grid_hw = self.backbone.grid_hw((image.shape[2], image.shape[3]))
        mask_logits = self.decode_head(patch_embeds, cls_embed, text_embeds)
        return SegmentationOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=cls_embed,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel, as the official evaluation does.

        Mask logits are upsampled to ``image_size`` (bilinear), squashed by a sigmoid, lowered by
        ``seen_bias`` for seen classes unless the model is self-trained, and resized to the input.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``, unit norm.

        Returns:
            ``[B, C, H, W]``, in ``[-seen_bias, 1]``.

        Raises:
            ShapeError: An argument has another shape, or ``seen_classes`` names a class that
                ``text_embeds`` does not have.
        """
        self._check_text(text_embeds)
        shift = self._seen_shift(text_embeds)
        logits = self.upsample(self(image, text_embeds).mask_logits)
        scores = logits.sigmoid() - shift.to(logits)
        return _resize(scores, (image.shape[2], image.shape[3]))

    def upsample(self, mask_logits: Tensor) -> Tensor:
        """Bring mask logits ``[B, C, gh, gw]`` to ``[B, C, image_size, image_size]``."""
        return _resize(mask_logits, (self.config.image_size, self.config.image_size))

    def _seen_shift(self, text_embeds: Tensor) -> Tensor:
        """What is taken off each class's score, ``[C, 1, 1]``."""
        shift = torch.zeros(len(text_embeds), 1, 1)
        seen = self.config.seen_classes
        if self.config.self_trained or not seen:
            return shift
        if min(seen) < 0 or max(seen) >= len(shift):
            raise ShapeError(
                f"seen_classes: expected indices from 0 to {len(shift) - 1}, the rows of "
                f"text_embeds, got {min(seen)} to {max(seen)}. Give the model the seen classes of "
                "this vocabulary."
            )
        shift[list(seen)] = self.config.seen_bias
        return shift

    def _check_text(self, text_embeds: Tensor) -> None:
        embed_dim = self.config.image_encoder.embed_dim
        if text_embeds.ndim != 2 or text_embeds.shape[1] != embed_dim or not len(text_embeds):
            raise ShapeError(
                f"text_embeds: expected [C, {embed_dim}] with at least one class, "
                f"got {list(text_embeds.shape)}. Use embeddings of this model's text encoder."
            )

    def fold_for_inference(self, size_hw: tuple[int, int] | None = None) -> InferenceParts:
        """Cut the model into the parts that are exported, constants precomputed.

        Args:
            size_hw: Input size in pixels; None is the size the positional embedding is stored
                for.

        Returns:
            The parts, in evaluation mode. They share unchanged weights with this model.

        Raises:
            ShapeError: The size is smaller than one patch.
        """
        if size_hw is None:
            encoder = self.config.image_encoder
            size_hw = (encoder.grid_side * encoder.patch_size,) * 2
        image_encoder = FoldedImageEncoder(self.backbone, size_hw)
        decoder = FoldedDecoder(self.decode_head.decoder_1)
        return InferenceParts(
            image_encoder=image_encoder,
            decoder=decoder,
            text_encoder=self.text_encoder,
            descriptor_weight=self.decode_head.q_proj.weight.detach(),
            descriptor_bias=self.decode_head.q_proj.bias.detach(),
            logit_scale=decoder.logit_scale,
            grid_hw=image_encoder.grid_hw,
            size_hw=size_hw,
        )


def _resize(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if x.shape[2:] == size_hw:
        return x
    return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)


def zegclip_from_official(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    decoder_heads: int = 8,
    text_heads: int | None = None,
    image_size: int | None = None,
    seen_classes: Sequence[int] = (),
    self_trained: bool = False,
    with_text_encoder: bool = True,
    prompt_dropout: float = 0.1,
    decoder_dropout: float = 0.1,
) -> ZegCLIP:
    """Build ZegCLIP from an official checkpoint's ``state_dict``; sizes are read from shapes.

    The decoder's ``self_attn.*`` and ``norm1.*`` (never run) and ``decode_head.loss_decode.*`` are
    ignored.

    Args:
        state_dict: Official keys, float32; see
            :func:`zsseg_rt.models.checkpoints.load_checkpoint`.
        num_heads: Heads of the image tower; None is one per 64 channels.
        decoder_heads: Heads of the decoder.
        text_heads: Heads of the text tower; None is one per 64 channels.
        image_size: Side in pixels that masks are upsampled to before the sigmoid; None is the
            size the positional embedding is stored for (512 officially).
        seen_classes: Rows of the text embeddings whose classes were trained on. Official: 0 to 14
            for VOC, the 156 seen classes for COCO-Stuff. Empty: ``predict`` shifts no score.
        self_trained: Whether the weights come from self-training; no score is shifted.
        with_text_encoder: Whether to build the text tower when the checkpoint holds one.
        prompt_dropout: Dropout on the projected prompts, in training.
        decoder_dropout: Dropout in the decoder's layers, in training.

    Returns:
        The model, in evaluation mode. The weights are copies.

    Raises:
        CheckpointError: Keys are missing, unknown or of another shape or dtype.
    """
    check_float32(state_dict, "zegclip")
    sizes = Sizes(state_dict, "zegclip")
    image_encoder = replace(_image_encoder_config(sizes, num_heads), prompt_dropout=prompt_dropout)
    has_text = with_text_encoder and any(key.startswith("text_encoder.") for key in state_dict)
    config = ZegCLIPConfig(
        image_encoder=image_encoder,
        decoder=replace(_decoder_config(sizes, decoder_heads), dropout=decoder_dropout),
        text_encoder=text_encoder_config(sizes, "text_encoder.", text_heads) if has_text else None,
        image_size=image_size or image_encoder.grid_side * image_encoder.patch_size,
        seen_classes=tuple(int(index) for index in seen_classes),
        self_trained=self_trained,
    )
    with torch.device("meta"):
        model = ZegCLIP(config)
    ignored = _UNUSED_KEYS if has_text else (*_UNUSED_KEYS, r"text_encoder\..*")
    load_weights(model, state_dict, architecture="zegclip", ignored=ignored)
    return model.eval()


def zegclip_from_clip(
    *,
    pretrained: str | Path,
    clip: str = "ViT-B-16",
    activation: Activation | None = None,
    num_prompts: int = 10,
    image_size: int = 512,
    decoder: DecoderConfig | None = None,
    seen_classes: Sequence[int] = (),
    self_trained: bool = False,
) -> ZegCLIP:
    """Start ZegCLIP from CLIP weights, prompts and decode head initialised for training.

    The positional embedding is resized to ``image_size`` (bilinear).

    Args:
        pretrained: A file or an open_clip tag; see :func:`zsseg_rt.models.clip.load_clip`.
        clip: open_clip's name of the model, for a tag.
        activation: For a ``state_dict`` file, which does not say.
        num_prompts: Visual prompts a layer; officially 10 for VOC, 100 for COCO-Stuff.
        image_size: Side of training crops, in pixels; a multiple of the patch size.
        decoder: Sizes of the decoder; None is the official ones at CLIP's embedding width.
        seen_classes: Rows of the text embeddings that are trained on.
        self_trained: Whether training is self-training; see :class:`ZegCLIPConfig`.

    Returns:
        The model, in evaluation mode, with its text tower.

    Raises:
        CheckpointError: The weights cannot be read or are not a CLIP ViT's.
    """
    weights = load_clip(pretrained, architecture=clip, activation=activation)
    config = image_encoder_config(
        Sizes(weights.visual, "CLIP"), "", weights.num_heads, weights.activation
    )
    side = image_size // config.patch_size
    image_encoder = replace(
        config, grid_side=side, num_prompts=num_prompts, num_deep_prompts=config.num_layers - 1
    )
    model = ZegCLIP(
        ZegCLIPConfig(
            image_encoder=image_encoder,
            decoder=decoder
            or DecoderConfig(query_dim=config.embed_dim, ffn_dim=4 * config.embed_dim),
            text_encoder=text_encoder_config(
                Sizes(weights.text, "CLIP"), "", weights.text_heads, weights.activation
            ),
            image_size=image_size,
            seen_classes=tuple(int(index) for index in seen_classes),
            self_trained=self_trained,
        )
    )
    _load_towers(model, weights, side)
    return model.eval()


def _load_towers(model: ZegCLIP, weights: ClipWeights, grid_side: int) -> None:
    name = "positional_embedding"
    resized = resize_positional_embedding(weights.visual[name], (grid_side, grid_side))
    visual = weights.visual | {name: resized}
    state_dict = (
        model.state_dict()
        | {f"backbone.{key}": value for key, value in visual.items()}
        | {f"text_encoder.{key}": value for key, value in weights.text.items()}
    )
    load_weights(model, state_dict, architecture="CLIP")


_UNUSED_KEYS = (
    r"decode_head\.decoder_1\.layers\.\d+\.(self_attn|norm1)\..*",
    r"decode_head\.loss_decode\..*",
)


def _image_encoder_config(sizes: Sizes, num_heads: int | None) -> ImageEncoderConfig:
    num_deep_prompts, num_prompts, _ = sizes.of("backbone.deep_prompt_embeddings", 3)
    return replace(
        image_encoder_config(sizes, "backbone.", num_heads),
        num_prompts=num_prompts,
        num_deep_prompts=num_deep_prompts,
    )


def _decoder_config(sizes: Sizes, num_heads: int) -> DecoderConfig:
    query_dim = sizes.of("decode_head.q_proj.weight", 2)[0]
    return DecoderConfig(
        query_dim=query_dim,
        num_layers=sizes.count("decode_head.decoder_1.layers."),
        num_heads=sizes.heads("decoder_heads", num_heads, query_dim),
        ffn_dim=sizes.of("decode_head.decoder_1.layers.0.linear1.weight", 2)[0],
    )
