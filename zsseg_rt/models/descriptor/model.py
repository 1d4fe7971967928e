"""ZegCLIP, and CLIP-RC, which adds cell tokens, queries of each cell, and a decoder of both ways.

In the mask decoder class queries attend to patches, and the attention scores are the masks. A cell,
which the paper of CLIP-RC calls a region, is one square of a regular grid over the image.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout. Decoder tensors that no forward pass reads (``self_attn.*``, ``norm1.*``) do not
exist here; checkpoints of the Jittor port lack them too.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common import schema
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    ScoreActivation,
    SegmentationOutput,
    SlideSettings,
    lower_seen,
)
from zsseg_rt.models.clip.towers import (
    ImageEncoderConfig,
    PromptedImageEncoder,
    TextEncoder,
    TextEncoderConfig,
    attend,
    unit,
    with_cells,
)
from zsseg_rt.models.functional import (
    check_text_embeds,
    describe,
    patch_text_similarity,
    relationship_descriptor,
)
from zsseg_rt.networks.descriptor import cells_of_patches
from zsseg_rt.torch_files.descriptor_arrays import IMAGE_MEAN, IMAGE_STD


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the mask decoder; the defaults are official."""

    query_dim: int = 512  # Width E of class queries
    num_layers: int = 3  # Decoder layers
    num_heads: int = 8  # Heads of the cross attention
    ffn_dim: int = 2048  # Hidden width of the feed-forward networks
    # Dropout on the attention's weights, after the attention, and inside and after the feed-forward
    # network, in training
    dropout: float = 0.1


class CrossAttention(nn.Module):
    """Queries attend to patches; the scaled scores themselves are the masks."""

    def __init__(
        self, query_dim: int, memory_dim: int, num_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(query_dim, query_dim)
        self.k = nn.Linear(memory_dim, query_dim)
        self.v = nn.Linear(memory_dim, query_dim)
        self.proj = nn.Linear(query_dim, query_dim)

    @property
    def logit_scale(self) -> float:
        """Turns a full dot product into the mean over heads of the scaled dot products."""
        head_dim = self.q.out_features // self.num_heads
        return 1.0 / (self.num_heads * math.sqrt(head_dim))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from ``queries`` ``[B, C, E]`` to ``memory`` ``[B, N, D]``; ``[B, C, E]``."""
        q, k, v, rate = self.q(queries), self.k(memory), self.v(memory), self.dropout
        attended = attend(q, k, v, self.num_heads, dropout=rate if self.training else 0.0)
        return self.proj(attended)  # type: ignore[no-any-return]

    def mask_logits(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Scaled scores before the softmax, averaged over heads, ``[B, C, N]``."""
        return patch_text_similarity(
            self.k(memory), self.q(queries), logit_scale=self.logit_scale, normalize=False
        )


class DecoderLayer(nn.Module):
    """Cross attention and a feed-forward network, each followed by its norm."""

    def __init__(self, config: DecoderConfig, memory_dim: int) -> None:
        super().__init__()
        dim = config.query_dim
        self.dropout = config.dropout
        self.multihead_attn = CrossAttention(dim, memory_dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Refine ``queries`` ``[B, C, E]`` by ``memory`` ``[B, N, D]``."""
        attended = self.multihead_attn(queries, memory)
        queries = self.norm2(queries + self._drop(attended))
        hidden = self._drop(F.relu(self.linear1(queries)))
        return self.norm3(queries + self._drop(self.linear2(hidden)))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DecoderStack(nn.Module):
    """Several layers, named ``layers`` as in official checkpoints."""

    def __init__(self, config: DecoderConfig, memory_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config, memory_dim) for _ in range(config.num_layers)
        )

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @torch.no_grad()
    def copy_first_layer(self) -> None:
        """Start all layers with the first one's weights, as officially."""
        first, *others = self.decoder_layers()
        for layer in others:
            layer.load_state_dict(first.state_dict())


class MaskDecoder(DecoderStack):
    """The layers; the masks are the last layer's attention scores.

    The last layer's value, output projection, norms and feed-forward network belong to official
    checkpoints but are never run.
    """

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Mask logits ``[B, C, N]`` of ``queries`` ``[B, C, E]`` over ``memory`` ``[B, N, D]``."""
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        last = self.layers[-1].multihead_attn
        assert isinstance(last, CrossAttention)
        return last.mask_logits(queries, memory)


_RETIRED = ("start_offset", "start_scale", "low_initial_logits")
_INSTEAD = "Leave it out; in a checkout, tools.studies.starts.HeadStart gives such initial weights."


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings of retired initial weights, as :func:`schema.without_retired` does."""
    starts = ("start",) if settings.get("start") == "aligned" else ()
    return schema.without_retired(settings, dict.fromkeys((*_RETIRED, *starts), _INSTEAD))


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig:
    """Everything that defines a model besides its weights; the defaults are VOC's."""

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)  # Image tower
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # Mask decoder
    # Text tower, or None for a model that is given text embeddings only
    text_encoder: TextEncoderConfig | None = None
    # Side in pixels that mask logits are upsampled to before the sigmoid, whatever the input's size
    # (official img_size)
    image_size: int = 512
    # Rows of the text embeddings whose classes were trained on; their scores are lowered by
    # seen_bias. Empty: no score is lowered
    seen_classes: tuple[int, ...] = ()
    # Whether the weights come from self-training; then no score is lowered
    self_trained: bool = False
    seen_bias: float = 0.1  # How much they are lowered, as a probability
    # What turns mask logits into probabilities. Officially a sigmoid; "softmax" over classes is for
    # models trained with cross entropy
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
        """

    @abstractmethod
    def encoder_outputs(self, output: SegmentationOutput) -> tuple[Tensor, Tensor]:
        """Outputs of the exported image encoder, ``[1, N, M]`` and ``[R, D]``."""

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
        """Score every class at every pixel; see :meth:`PixelModel.predict`.

        Mask logits are upsampled to ``image_size`` (bilinear), squashed by the activation, lowered
        by ``seen_bias`` for seen classes unless the model is self-trained, and resized to the
        input: ``[B, C, H, W]`` in ``[-seen_bias, 1]``.
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


Descriptor = Literal["relationship", "text"]


@dataclass(frozen=True, kw_only=True)
class ZegCLIPConfig(DescriptorConfig):
    """Everything that defines a ZegCLIP model besides its weights."""

    # What class queries are made of. "relationship" is official: the image's embedding times the
    # text's, and the text's. "text" leaves the image out, to measure what it contributes
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
        """Mask logits ``[B, C, N]`` of ``[B, N, D]``, ``[B, D]`` and ``[C, D]``, all unit norm."""
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


class CellEmbeds(NamedTuple):
    """The result of the cell image tower."""

    patch_embeds: Tensor  # [B, N, D], row-major over the grid, unit norm
    cls_embed: Tensor  # [B, D], unit norm
    cell_embeds: Tensor  # [B, R, D], row-major over the square grid of cells, unit norm


def attention_allowed(
    grid_hw: tuple[int, int], num_cells: int, num_prompts: int, *, official: bool = False
) -> Tensor:
    """Which token may see which: rows see columns, ordered class, prompts, patches, cells.

    Class, prompts and patches see each other. A cell and its own patches see each other, and a
    cell sees itself; no other token sees a cell, and a cell sees no other token.

    Returns:
        bool ``[1 + P + N + R, 1 + P + N + R]``.
    """
    cells = torch.from_numpy(cells_of_patches(grid_hw, num_cells, official=official))
    inside = F.one_hot(cells, num_cells + 1)[:, :num_cells].bool()
    first_patch = 1 + num_prompts
    first_cell = first_patch + len(inside)
    size = first_cell + num_cells
    allowed = torch.zeros(size, size, dtype=torch.bool)
    allowed[:first_cell, :first_cell] = True
    allowed[first_patch:first_cell, first_cell:] = inside
    allowed[first_cell:, first_patch:first_cell] = inside.T
    allowed[first_cell:, first_cell:] = torch.eye(num_cells, dtype=torch.bool)
    return allowed


def upsample_cells(cell_embeds: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Spread cells ``[B, R, D]``, over the patch grid, bilinearly, ``[B, N, D]``."""
    side = math.isqrt(cell_embeds.shape[1])
    cells = torch.unflatten(cell_embeds.transpose(1, 2), 2, (side, side))
    spread = F.interpolate(cells, size=grid_hw, mode="bilinear", align_corners=False)
    return spread.flatten(2).transpose(1, 2)


class CellImageEncoder(PromptedImageEncoder):
    """The prompted image tower with cell tokens after the patches.

    Cell tokens have no position and get no ``prompt_norm``; what they see is all that tells them
    apart, because officially they all start as one vector and are frozen.
    """

    def __init__(self, config: ImageEncoderConfig, *, exact: bool = False) -> None:
        super().__init__(config)
        self.exact = exact
        self.region_level_bridge = nn.Parameter(torch.zeros(config.num_cells, config.width))

    def grid_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid; see :meth:`ImageEncoder.grid_hw`."""
        grid_hw = super().grid_hw(size_hw)
        grid_side, side = self.config.grid_side, self.config.side
        if self.exact and grid_hw != (grid_side, grid_side):
            raise ShapeError(
                f"image: expected {side}x{side} pixels in exact mode, got "
                f"{size_hw[0]}x{size_hw[1]}. The official cell mask has one size: resize or crop "
                "the image, or build the model with exact=False."
            )
        return grid_hw

    def attention_allowed(self, grid_hw: tuple[int, int], num_prompts: int) -> Tensor:
        """The mask for a grid: as in the official code on the official grid, else cut evenly."""
        official = grid_hw == (self.config.grid_side,) * 2
        return attention_allowed(grid_hw, self.config.num_cells, num_prompts, official=official)

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class, patch and cell tokens after ``ln_pre``, ``[B, 1 + N + R, W]``."""
        cells = self.region_level_bridge.expand(image.shape[0], -1, -1)
        return self.ln_pre(torch.cat([self.input_tokens(image), cells], dim=1))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> CellEmbeds:  # type: ignore[override]
        """Encode images; see :meth:`ImageEncoder.forward`."""
        tokens, num_cells = self.embed_patches(image), self.config.num_cells
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))

        def mask_of(num_prompts: int) -> Tensor:
            return self.attention_allowed(grid_hw, num_prompts).to(image.device)

        cls_token, prompts, others = self.run_blocks(tokens, mask_of)
        seeing_all = torch.cat([cls_token, prompts, others[:, :-num_cells]], dim=1)
        normed = self.prompt_norm(seeing_all)
        embeds = self.project(torch.cat([normed, others[:, -num_cells:]], dim=1))
        patches = embeds[:, 1 + prompts.shape[1] : -num_cells]
        return CellEmbeds(unit(patches), unit(embeds[:, 0]), unit(embeds[:, -num_cells:]))


@dataclass(frozen=True, kw_only=True)
class ClipRCConfig(DescriptorConfig):
    """Everything that defines a CLIP-RC model besides its weights."""

    image_encoder: ImageEncoderConfig = field(
        default_factory=lambda: ImageEncoderConfig(num_cells=16)
    )
    # Whether images with a grid other than the official one are refused, as the official code does;
    # otherwise the cell mask is built for the image's own grid
    exact: bool = False
    # Whether the model has the recovery decoder, which runs in training only
    with_recovery: bool = True

    @staticmethod
    def from_earlier(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as earlier versions wrote them, in today's words."""
        return with_cells(without_retired(raw))


@dataclass(frozen=True)
class Recovery:
    """The recovery decoder's view of the decoded tokens, and its targets.

    The recovery loss is ``|queries - query_targets|.mean() + |patches - patch_targets|.mean()``
    times its weight. No gradient flows into the targets.
    """

    queries: Tensor  # [B, R * C, 2D], cell-major
    patches: Tensor  # [B, N, D]
    query_targets: Tensor  # The queries before their projection, [B, R * C, 2D]
    patch_targets: Tensor  # The patch embeddings, [B, N, D]


@dataclass(frozen=True)
class CellOutput(SegmentationOutput):
    """The result of a forward pass of CLIP-RC."""

    cell_embeds: Tensor  # Unit-norm cell embeddings, [B, D, r, r]
    recovery: Recovery | None = None  # Set in training with a recovery decoder, otherwise None


class RecoveryDecoder(nn.Module):
    """Recovers CLIP's embeddings from the decoded tokens; a regulariser in training."""

    def __init__(self, config: DecoderConfig, embed_dim: int) -> None:
        super().__init__()
        dim = config.query_dim
        self.decouple_q = nn.ModuleList([DecoderLayer(config, dim)])
        self.decouple_v = nn.ModuleList([DecoderLayer(config, dim)])
        self.linear_q_in = nn.Linear(dim, dim)
        self.linear_k_in = nn.Linear(dim, dim)
        self.linear_q_out = nn.Linear(dim, 2 * embed_dim)
        self.linear_k_out = nn.Linear(dim, embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[B, R * C, E]`` and ``[B, N, E]`` to ``[B, R * C, 2D]`` and ``[B, N, D]``."""
        queries, patches = self.linear_q_in(queries), self.linear_k_in(patches)
        for query_layer, patch_layer in zip(self.decouple_q, self.decouple_v, strict=True):
            queries, patches = query_layer(queries, patches), patch_layer(patches, queries)
        return self.linear_q_out(queries), self.linear_k_out(patches)


class CellDecodeHead(nn.Module):
    """Cell-aware queries and patches, and the decoder that refines each by the other."""

    def __init__(self, config: DecoderConfig, embed_dim: int, *, with_recovery: bool) -> None:
        super().__init__()
        dim = config.query_dim
        self.q_proj = nn.Linear(2 * embed_dim, dim)
        self.lateral_proj = nn.Linear(3 * embed_dim, dim)
        self.decoder_q = DecoderStack(config, dim)
        self.decoder_v = DecoderStack(config, dim)
        self.recovery_decoder = RecoveryDecoder(config, embed_dim) if with_recovery else None

    @torch.no_grad()
    def scale_for_unit_inputs(self) -> None:
        """Multiply the initial weights of unit-vector inputs by ``sqrt(D)``, as in ZegCLIP."""
        width = self.q_proj.in_features // 2
        for linear in (self.q_proj, self.lateral_proj):
            linear.weight.mul_(math.sqrt(width))

    def describe_cells(self, embeds: CellEmbeds, text_embeds: Tensor) -> Tensor:
        """Relate every cell to every class, ``[B, R * C, 2D]``, cell-major."""
        cells = embeds.cell_embeds + embeds.cls_embed[:, None]
        described = describe(cells.flatten(0, 1), text_embeds)
        return torch.unflatten(described, 0, cells.shape[:2]).flatten(1, 2)

    def lateral(self, embeds: CellEmbeds, grid_hw: tuple[int, int]) -> Tensor:
        """Cell-aware patches, ``[B, N, E]``."""
        cells = upsample_cells(embeds.cell_embeds, grid_hw)
        image_embed = embeds.cls_embed[:, None].expand(-1, cells.shape[1], -1)
        joined = torch.cat([cells, image_embed, embeds.patch_embeds], dim=-1)
        return self.lateral_proj(joined)  # type: ignore[no-any-return]

    def forward(
        self, embeds: CellEmbeds, grid_hw: tuple[int, int], text_embeds: Tensor
    ) -> tuple[Tensor, Recovery | None]:
        """Mask logits ``[B, C, N]``, and in training the output of a recovery decoder."""
        described = self.describe_cells(embeds, text_embeds)
        queries, patches = self.q_proj(described), self.lateral(embeds, grid_hw)
        layers = zip(self.decoder_q.layers, self.decoder_v.layers, strict=True)
        for query_layer, patch_layer in layers:
            queries, patches = query_layer(queries, patches), patch_layer(patches, queries)
        by_cell = torch.unflatten(queries, 1, (-1, len(text_embeds)))
        # The mean over cells commutes with the product: R times fewer multiplications in it.
        mask_logits = patch_text_similarity(patches, by_cell.mean(dim=1), normalize=False)
        if self.recovery_decoder is None or not self.training:
            return mask_logits, None
        recovered_queries, recovered_patches = self.recovery_decoder(queries, patches)
        return mask_logits, Recovery(
            queries=recovered_queries,
            patches=recovered_patches,
            query_targets=described.detach(),
            patch_targets=embeds.patch_embeds.detach(),
        )


class ClipRC(DescriptorModel):
    """The complete model; see :class:`zsseg_rt.models.descriptor.model.DescriptorModel`.

    The official code only takes 512x512 pixels. Here any size of at least one patch works, square
    or not, unless ``config.exact`` is set: the cells then divide the image's own grid.
    """

    architecture = "clip_rc"
    independent_queries = False
    config: ClipRCConfig
    backbone: CellImageEncoder
    decode_head: CellDecodeHead

    def __init__(self, config: ClipRCConfig) -> None:
        encoder = config.image_encoder
        head = CellDecodeHead(config.decoder, encoder.embed_dim, with_recovery=config.with_recovery)
        super().__init__(config, CellImageEncoder(encoder, exact=config.exact), head)

    def forward(self, image: Tensor, text_embeds: Tensor) -> CellOutput:
        """See :meth:`DescriptorModel.forward`."""
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        embeds = self.backbone(image)
        grid_hw = self.backbone.grid_hw((image.shape[2], image.shape[3]))
        text_embeds = text_embeds.to(embeds.patch_embeds)
        mask_logits, recovery = self.decode_head(embeds, grid_hw, text_embeds)
        side = math.isqrt(self.config.image_encoder.num_cells)
        return CellOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(embeds.patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=embeds.cls_embed,
            cell_embeds=torch.unflatten(embeds.cell_embeds.transpose(1, 2), 2, (side, side)),
            recovery=recovery,
        )

    def encoder_outputs(self, output: SegmentationOutput) -> tuple[Tensor, Tensor]:
        """Projected patches, and cells plus image; see :meth:`DescriptorModel.encoder_outputs`."""
        assert isinstance(output, CellOutput)
        embeds = CellEmbeds(
            patch_embeds=output.patch_embeds.flatten(2).transpose(1, 2),
            cls_embed=output.cls_embed,
            cell_embeds=output.cell_embeds.flatten(2).transpose(1, 2),
        )
        height, width = output.patch_embeds.shape[2:]
        cells = embeds.cell_embeds + embeds.cls_embed[:, None]
        return self.decode_head.lateral(embeds, (height, width)), cells[0]
