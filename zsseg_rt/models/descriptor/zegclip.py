"""ZegCLIP: CLIP with deep visual prompts, a relationship descriptor and a mask decoder.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout. Decoder tensors that no forward pass reads (``self_attn.*``, ``norm1.*``) do not
exist here.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.models.base import SegmentationOutput
from zsseg_rt.models.clip.towers import PromptedImageEncoder
from zsseg_rt.models.descriptor.model import (
    DecoderConfig,
    DescriptorConfig,
    DescriptorModel,
    MaskDecoder,
)
from zsseg_rt.models.functional import check_text_embeds, relationship_descriptor

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
        """Check the settings."""
        super().__post_init__()
        check_choice("descriptor", self.descriptor, get_args(Descriptor))


class DecodeHead(nn.Module):
    """Relationship descriptor and mask decoder."""

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

    def forward(self, patch_embeds: Tensor, cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
        """Mask logits.

        Shapes:
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
    """The complete model; see :class:`zsseg_rt.models.descriptor.model.DescriptorModel`."""

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
