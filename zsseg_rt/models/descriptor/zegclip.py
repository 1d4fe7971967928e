"""ZegCLIP: CLIP with deep visual prompts, a relationship descriptor and a mask decoder.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout. Decoder tensors that no forward pass reads (``self_attn.*``, ``norm1.*``) do not
exist here.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import ScoreActivation, SegmentationOutput
from zsseg_rt.models.clip.folded_image_encoder import FoldedImageEncoder
from zsseg_rt.models.clip.image_encoder import PromptedImageEncoder
from zsseg_rt.models.clip.transformer import Activation
from zsseg_rt.models.clip.weights import load_clip, text_encoder_config
from zsseg_rt.models.descriptor.mask_decoder import DecoderConfig, FoldedDecoder, MaskDecoder
from zsseg_rt.models.descriptor.model import (
    IMAGE_MEAN,
    IMAGE_STD,
    DescriptorConfig,
    DescriptorModel,
    InferenceParts,
    load_clip_towers,
    official_decoder_config,
    prompted_image_encoder_config,
    settings_from_clip,
)
from zsseg_rt.models.descriptor.starts import (
    COSINE_SCALE,
    Start,
    align_head,
    check_scale,
    check_start,
    copy_layers,
)
from zsseg_rt.models.functional import relationship_descriptor
from zsseg_rt.models.input_checks import check_text_embeds, read_class_indices
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32, load_weights

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "DecodeHead",
    "Descriptor",
    "InferenceParts",
    "ZegCLIP",
    "ZegCLIPConfig",
    "zegclip_from_clip",
    "zegclip_from_official",
]


Descriptor = Literal["relationship", "text"]


@dataclass(frozen=True, kw_only=True)
class ZegCLIPConfig(DescriptorConfig):
    """Everything that defines a ZegCLIP model besides its weights.

    Attributes:
        descriptor: What class queries are made of. ``"relationship"`` is official: the image's
            embedding times the text's, and the text's. ``"text"`` leaves the image out, to
            measure what it contributes.
    """

    descriptor: Descriptor = "relationship"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ArgumentError: A setting is unknown.
        """
        super().__post_init__()
        if self.descriptor not in get_args(Descriptor):
            raise ArgumentError(
                f"descriptor: expected 'relationship' or 'text', got {self.descriptor!r}. "
                "Check the spelling."
            )


class DecodeHead(nn.Module):
    """Relationship descriptor and mask decoder.

    Args:
        config: Sizes.
        embed_dim: Width D of the joint space.
        descriptor: What class queries are made of; see :class:`ZegCLIPConfig`.
    """

    def __init__(
        self, config: DecoderConfig, embed_dim: int, descriptor: Descriptor = "relationship"
    ) -> None:
        super().__init__()
        self.descriptor = descriptor
        width = embed_dim if descriptor == "text" else 2 * embed_dim
        self.q_proj = nn.Linear(width, config.query_dim)
        self.decoder_1 = MaskDecoder(config, embed_dim)

    def descriptor_weight(self) -> Tensor:
        """Weight of ``[cls * text, text]`` in the queries, ``[E, 2D]``."""
        weight = self.q_proj.weight
        if self.descriptor == "text":
            weight = torch.cat([torch.zeros_like(weight), weight], dim=1)
        return weight

    @torch.no_grad()
    def scale_for_unit_inputs(self) -> None:
        """Multiply the initial weights of unit-vector inputs by ``sqrt(D)``.

        torch's initial weights expect inputs of variance 1; those of a unit vector have 1 / D.
        Without the factor, biases drown out what tells classes apart until training has made up for
        it, which a short training cannot do. Not official.
        """
        width = self.decoder_1.decoder_layers()[0].multihead_attn.k.in_features
        readers = [self.q_proj]
        for layer in self.decoder_1.decoder_layers():
            readers += [layer.multihead_attn.k, layer.multihead_attn.v]
        for linear in readers:
            linear.weight.mul_(math.sqrt(width))

    def start(self, start: Start, offset: float) -> None:
        """Give the head other initial weights; see :func:`zegclip_from_clip`.

        Raises:
            ArgumentError: The start is unknown or impossible.
        """
        keys = self.decoder_1.decoder_layers()[0].multihead_attn.k
        check_start(start, offset, keys.out_features, keys.in_features)
        if start == "copies":
            copy_layers([self.decoder_1])
        if start == "aligned":
            align_head(self.q_proj, self.decoder_1, offset)

    @torch.no_grad()
    def scale_start(self, factor: float) -> None:
        """Multiply the cosine of the aligned start; the offset stays."""
        if factor != 1.0:
            attention = self.decoder_1.decoder_layers()[-1].multihead_attn
            for linear in (attention.q, attention.k):
                linear.weight.mul_(math.sqrt(factor))

    def forward(self, patch_embeds: Tensor, cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
        """Mask logits.

        Args:
            patch_embeds: ``[B, N, D]``, unit norm.
            cls_embed: ``[B, D]``, unit norm.
            text_embeds: ``[C, D]``, unit norm.

        Returns:
            ``[B, C, N]``.
        """
        if self.descriptor == "text":
            queries = self.q_proj(text_embeds).expand(len(cls_embed), -1, -1)
        else:
            queries = relationship_descriptor(
                cls_embed, text_embeds, self.q_proj.weight, self.q_proj.bias
            )
        return self.decoder_1(queries, patch_embeds)  # type: ignore[no-any-return]


class ZegCLIP(DescriptorModel):
    """The complete model; see :class:`zsseg_rt.models.descriptor.model.DescriptorModel`.

    Args:
        config: Sizes and the evaluation rule.
    """

    architecture = "zegclip"
    independent_queries = True
    decode_head: DecodeHead

    def __init__(self, config: ZegCLIPConfig) -> None:
        head = DecodeHead(config.decoder, config.image_encoder.embed_dim, config.descriptor)
        super().__init__(config, PromptedImageEncoder(config.image_encoder), head)

    def freeze_unread(self) -> None:
        """Freeze the last layer except queries and keys; see :class:`DescriptorModel`."""
        last = self.decode_head.decoder_1.decoder_layers()[-1]
        last.requires_grad_(False)
        last.multihead_attn.q.requires_grad_(True)
        last.multihead_attn.k.requires_grad_(True)

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """See :meth:`DescriptorModel.forward`."""
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        patch_embeds, cls_embed = self.backbone(image)
        text_embeds = text_embeds.to(patch_embeds)
        grid_hw = self.backbone.grid_hw((image.shape[2], image.shape[3]))
        mask_logits = self.decode_head(patch_embeds, cls_embed, text_embeds)
        return SegmentationOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=cls_embed,
        )

    def encoder_outputs(self, output: SegmentationOutput) -> tuple[Tensor, Tensor]:
        """Patch and class embeddings, unchanged; see :meth:`DescriptorModel.encoder_outputs`."""
        return output.patch_embeds.flatten(2).transpose(1, 2), output.cls_embed

    def fold_for_inference(self, size_hw: tuple[int, int] | None = None) -> InferenceParts:
        """See :meth:`DescriptorModel.fold_for_inference`."""
        size_hw = size_hw or self.size_hw
        image_encoder = FoldedImageEncoder(self.backbone, size_hw)
        decoder = FoldedDecoder(self.decode_head.decoder_1)
        return InferenceParts(
            image_encoder=image_encoder,
            decoder=decoder,
            text_encoder=self.text_encoder,
            descriptor_weight=self.decode_head.descriptor_weight().detach(),
            descriptor_bias=self.decode_head.q_proj.bias.detach(),
            logit_scale=decoder.logit_scale,
            grid_hw=image_encoder.grid_hw,
            size_hw=size_hw,
            memory_dim=self.config.image_encoder.embed_dim,
        )


def zegclip_from_official(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    decoder_heads: int = 8,
    text_heads: int | None = None,
    image_size: int | None = None,
    seen_classes: Sequence[int] = (),
    self_trained: bool = False,
    score_activation: ScoreActivation = "sigmoid",
    with_text_encoder: bool = True,
    prompt_dropout: float = 0.1,
    decoder_dropout: float = 0.1,
) -> ZegCLIP:
    """Build ZegCLIP from an official checkpoint's ``state_dict``; sizes are read from shapes.

    The decoder's ``self_attn.*`` and ``norm1.*`` (never run) and ``decode_head.loss_decode.*`` are
    ignored.

    Args:
        state_dict: Official keys, float32; see
            :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.
        num_heads: Heads of the image tower; None is one per 64 channels.
        decoder_heads: Heads of the decoder.
        text_heads: Heads of the text tower; None is one per 64 channels.
        image_size: Side in pixels that masks are upsampled to before the sigmoid; None is the
            size the positional embedding is stored for (512 officially).
        seen_classes: Rows of the text embeddings whose classes were trained on. Official: 0 to 14
            for VOC, the 156 seen classes for COCO-Stuff. Empty: ``predict`` lowers no score.
        self_trained: Whether the weights come from self-training; then no score is lowered.
        score_activation: What turns mask logits into probabilities; see :class:`ZegCLIPConfig`.
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
    image_encoder = prompted_image_encoder_config(sizes, num_heads, prompt_dropout)
    has_text = with_text_encoder and any(key.startswith("text_encoder.") for key in state_dict)
    config = ZegCLIPConfig(
        image_encoder=image_encoder,
        decoder=official_decoder_config(sizes, _LAYERS, decoder_heads, decoder_dropout),
        text_encoder=text_encoder_config(sizes, "text_encoder.", text_heads) if has_text else None,
        image_size=image_encoder.side if image_size is None else image_size,
        seen_classes=read_class_indices("seen_classes", seen_classes),
        self_trained=self_trained,
        score_activation=score_activation,
        descriptor=_descriptor(sizes, image_encoder.embed_dim),
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
    patch_stride: int | None = None,
    decoder: DecoderConfig | None = None,
    seen_classes: Sequence[int] = (),
    self_trained: bool = False,
    score_activation: ScoreActivation = "sigmoid",
    descriptor: Descriptor = "relationship",
    unit_inputs: bool = False,
    start: Start = "random",
    start_offset: float = 0.0,
    start_scale: float | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
    trust: bool = False,
) -> ZegCLIP:
    """Start ZegCLIP from CLIP weights, prompts and decode head initialised for training.

    The positional embedding is resized to ``image_size`` (bilinear).

    Args:
        pretrained: A file or an open_clip tag; see :func:`zsseg_rt.models.clip.weights.load_clip`.
        clip: open_clip's name of the model, for a tag.
        activation: For a ``state_dict`` file, which does not store it.
        num_prompts: Visual prompts per layer; officially 10 for VOC, 100 for COCO-Stuff. 0 is for a
            backbone that is fine-tuned instead.
        image_size: Side of training crops, in pixels; a multiple of the patch size.
        patch_stride: Pixels from one patch to the next, such as half the patch size for four
            times as many patches; None is the patch size, as officially.
        decoder: Sizes of the decoder; None is the official ones at CLIP's embedding width.
        seen_classes: Rows of the text embeddings that are trained on.
        self_trained: Whether training is self-training; see :class:`ZegCLIPConfig`.
        score_activation: What turns mask logits into probabilities; see :class:`ZegCLIPConfig`.
        descriptor: What class queries are made of; see :class:`ZegCLIPConfig`.
        unit_inputs: Whether initial weights are scaled for the unit vectors that they read, for
            short trainings; see :meth:`DecodeHead.scale_for_unit_inputs`. Not official.
        start: Initial weights of the decode head: ``"random"``; ``"copies"``, in which all layers
            of a decoder start as its first, as officially; ``"aligned"``, in which masks start as
            a multiple of the cosine of patch and name, see
            :mod:`zsseg_rt.models.descriptor.starts`. Not official.
        start_offset: Added to all mask logits of the aligned start, such as -3 for masks that
            start empty.
        start_scale: Factor on the cosine of the aligned start; None is 14, which
            training replaces by one that fits its names; see
            :func:`zsseg_rt.models.descriptor.starts.scale_for`.
        num_heads: Heads of the image tower, for a file; None is one per 64 channels.
        text_heads: Heads of the text tower, for a file; None is one per 64 channels.
        trust: See :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.

    Returns:
        The model, in evaluation mode, with its text tower.

    Raises:
        ArgumentError: A setting is unknown.
        CheckpointError: The weights cannot be read or are not a CLIP ViT's.
        ShapeError: Patches do not fill ``image_size`` exactly.
    """
    weights = load_clip(
        pretrained,
        architecture=clip,
        activation=activation,
        num_heads=num_heads,
        text_heads=text_heads,
        trust=trust,
    )
    config = ZegCLIPConfig(
        **settings_from_clip(
            weights,
            image_size=image_size,
            num_prompts=num_prompts,
            decoder=decoder,
            patch_stride=patch_stride,
        ),
        seen_classes=read_class_indices("seen_classes", seen_classes),
        self_trained=self_trained,
        score_activation=score_activation,
        descriptor=descriptor,
    )
    model = ZegCLIP(config)
    load_clip_towers(model, weights)
    if unit_inputs:
        model.decode_head.scale_for_unit_inputs()
    scale = check_scale(start, start_scale)
    model.decode_head.start(start, start_offset)
    model.decode_head.scale_start(scale / COSINE_SCALE)
    return model.eval()


_LAYERS = "decode_head.decoder_1.layers."
_UNUSED_KEYS = (
    r"decode_head\.decoder_1\.layers\.\d+\.(self_attn|norm1)\..*",
    r"decode_head\.loss_decode\..*",
)


def _descriptor(sizes: Sizes, embed_dim: int) -> Descriptor:
    return "text" if sizes.of("decode_head.q_proj.weight", 2)[1] == embed_dim else "relationship"
