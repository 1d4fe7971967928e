"""ZegCLIP, and CLIP-RC, which adds cell tokens, queries of each cell, and a decoder of both ways.

A cell, which the paper of CLIP-RC calls a region, is one square of a regular grid over the image.
Names are the official checkpoints'; decoder tensors that no forward pass reads (``self_attn.*``,
``norm1.*``) do not exist here.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    SegmentationOutput,
    SlideSettings,
    lower_seen,
)
from zsseg_rt.models.clip.towers import (
    ImageEmbeds,
    ImageEncoderConfig,
    PromptedImageEncoder,
    TextEncoder,
    TextEncoderConfig,
    attend,
    unit,
)
from zsseg_rt.models.clip.weights import (
    ClipSource,
    image_config,
    image_encoder_config,
    load_into,
    start_from_clip,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.functional import (
    check_text_embeds,
    describe,
    patch_text_similarity,
    relationship_descriptor,
    shared_fields,
)
from zsseg_rt.networks.descriptor import allowed_tokens
from zsseg_rt.torch_files.checkpoints import check_float32
from zsseg_rt.torch_files.clip_arrays import ClipTensors
from zsseg_rt.torch_files.official import IMAGE_MEAN, IMAGE_STD, check_descriptor
from zsseg_rt.torch_files.shapes import Checked, divisor


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
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @torch.no_grad()
    def copy_first_layer(self) -> None:
        """Start all layers with the first one's weights, as officially."""
        first, *others = self.decoder_layers()
        for layer in others:
            layer.load_state_dict(first.state_dict())


class MaskDecoder(DecoderStack):
    """The layers, of the last of which only the attention scores are used: they are the masks."""

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Mask logits ``[B, C, N]`` of ``queries`` ``[B, C, E]`` over ``memory`` ``[B, N, D]``."""
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        last = self.layers[-1].multihead_attn
        assert isinstance(last, CrossAttention)
        return last.mask_logits(queries, memory)


@dataclass(frozen=True, kw_only=True)
class ZegCLIPConfig:
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

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, (int, np.integer)) or self.image_size < 1:
            raise ArgumentError(
                f"image_size: expected the side of a square in pixels, got {self.image_size!r}. "
                "Leave it out for the size of the positional embedding."
            )


@dataclass(frozen=True)
class Recovery:
    """The recovery decoder's view of the decoded tokens, and its targets, without gradient."""

    queries: Tensor  # [B, R * C, 2D], cell-major
    patches: Tensor  # [B, N, D]
    query_targets: Tensor  # The queries before their projection, [B, R * C, 2D]
    patch_targets: Tensor  # The patch embeddings, [B, N, D]


@dataclass(frozen=True)
class DescriptorOutput(SegmentationOutput):
    """The result of a forward pass; what is None in ZegCLIP is CLIP-RC's."""

    cell_embeds: Tensor | None = None  # Unit-norm cell embeddings, [B, D, r, r]
    recovery: Recovery | None = None  # Set in training with a recovery decoder


class DescriptorModel(PixelModel):
    """A CLIP image tower with deep prompts, a relationship descriptor and a decode head.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`
    (ImageNet's, not CLIP's). Only the prompts, ``prompt_norm`` and the decode head require
    gradients; as in the official code, some of these never receive one.
    """

    image_mean = IMAGE_MEAN
    image_std = IMAGE_STD
    config: ZegCLIPConfig

    def __init__(
        self, config: ZegCLIPConfig, backbone: PromptedImageEncoder, decode_head: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.decode_head = decode_head
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder else None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("decode_head.") or "prompt" in name)

    def freeze_unread(self) -> None:
        """Freeze the parameters that official checkpoints hold but no forward pass reads."""

    def forward(self, image: Tensor, text_embeds: Tensor) -> DescriptorOutput:
        """Compute mask logits at the grid's resolution.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch
                (officially square).
            text_embeds: Class embeddings, ``[C, D]``, unit norm; brought to the image's dtype.
        """
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        embeds: ImageEmbeds = self.backbone(image)
        grid_hw = self.backbone.grid_hw((image.shape[2], image.shape[3]))
        text_embeds = text_embeds.to(embeds.patch_embeds)
        mask_logits, recovery = self.decode_head(embeds, grid_hw, text_embeds)
        return DescriptorOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(embeds.patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=embeds.cls_embed,
            cell_embeds=None if embeds.cell_embeds is None else _as_square(embeds.cell_embeds),
            recovery=recovery,
        )

    @property
    def size_hw(self) -> tuple[int, int]:
        """The input size in pixels that the positional embedding is stored for."""
        return (self.config.image_encoder.side,) * 2

    @property
    def crop_hw(self) -> tuple[int, int]:
        return self.config.image_size, self.config.image_size

    @property
    def windows(self) -> SlideSettings:
        """Short side and window are the input's; windows step by 426 / 512 of it."""
        side = self.size_hw[0]
        return SlideSettings(short_side=side, crop_size=side, stride=side * 426 // 512)

    @property
    def label_rule(self) -> LabelRule:
        config = self.config
        return LabelRule(
            activation="sigmoid",
            seen_classes=() if config.self_trained else config.seen_classes,
            seen_bias=config.seen_bias,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel, ``[B, C, H, W]`` in ``[-seen_bias, 1]``.

        Mask logits are upsampled to ``image_size`` (bilinear), squashed, lowered by ``seen_bias``
        for seen classes unless the model is self-trained, and resized to the input.
        """
        logits = self.upsample(self(image, text_embeds).mask_logits)
        rule = self.label_rule
        scores = lower_seen(logits.sigmoid(), rule.seen_classes, rule.seen_bias)
        return _resize(scores, (image.shape[2], image.shape[3]))

    def upsample(self, mask_logits: Tensor) -> Tensor:
        """Upsample mask logits ``[B, C, gh, gw]`` to ``[B, C, image_size, image_size]``."""
        return _resize(mask_logits, (self.config.image_size, self.config.image_size))


def _resize(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if x.shape[2:] == size_hw:
        return x
    return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)


def _as_square(cells: Tensor) -> Tensor:
    """Cells ``[B, R, D]`` as a map ``[B, D, r, r]``."""
    side = math.isqrt(cells.shape[1])
    return torch.unflatten(cells.transpose(1, 2), 2, (side, side))


class DecodeHead(nn.Module):
    """Relationship descriptor and mask decoder."""

    def __init__(self, config: DecoderConfig, embed_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * embed_dim, config.query_dim)
        self.decoder_1 = MaskDecoder(config, embed_dim)

    @torch.no_grad()
    def scale_for_unit_inputs(self) -> None:
        """Multiply the initial weights of unit-vector inputs by ``sqrt(D)``. Not official.

        torch's initial weights expect inputs of variance 1, not 1 / D: biases would drown out what
        tells classes apart until training has made up for it, which a short training cannot do.
        """
        width = self.decoder_1.decoder_layers()[0].multihead_attn.k.in_features
        readers = [self.q_proj]
        for layer in self.decoder_1.decoder_layers():
            readers += [layer.multihead_attn.k, layer.multihead_attn.v]
        for linear in readers:
            linear.weight.mul_(math.sqrt(width))

    def forward(
        self, embeds: ImageEmbeds, grid_hw: tuple[int, int], text_embeds: Tensor
    ) -> tuple[Tensor, None]:
        """Mask logits ``[B, C, N]`` of embeddings ``[C, D]``, unit norm."""
        queries = relationship_descriptor(
            embeds.cls_embed, text_embeds, self.q_proj.weight, self.q_proj.bias
        )
        return self.decoder_1(queries, embeds.patch_embeds), None


class ZegCLIP(DescriptorModel):
    """The complete model."""

    architecture = "zegclip"
    decode_head: DecodeHead

    def __init__(self, config: ZegCLIPConfig) -> None:
        head = DecodeHead(config.decoder, config.image_encoder.embed_dim)
        super().__init__(config, PromptedImageEncoder(config.image_encoder), head)

    def freeze_unread(self) -> None:
        """Freeze the last layer except queries and keys; see :class:`DescriptorModel`."""
        last = self.decode_head.decoder_1.decoder_layers()[-1]
        last.requires_grad_(False)
        last.multihead_attn.q.requires_grad_(True)
        last.multihead_attn.k.requires_grad_(True)


def attention_allowed(
    grid_hw: tuple[int, int], num_cells: int, num_prompts: int, *, official: bool = False
) -> Tensor:
    """Which token may see which, bool ``[1 + P + N + R]`` twice: class, prompts, patches, cells.

    All but cells see each other. A cell and its own patches see each other; a cell sees itself.
    """
    allowed = allowed_tokens(grid_hw, num_cells, official=official)
    index = np.concatenate([np.zeros(num_prompts, int), np.arange(len(allowed))])
    return torch.from_numpy(allowed[np.ix_(index, index)])  # prompts see what the class token sees


def upsample_cells(cell_embeds: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Spread cells ``[B, R, D]``, over the patch grid, bilinearly, ``[B, N, D]``."""
    cells = _as_square(cell_embeds)
    spread = F.interpolate(cells, size=grid_hw, mode="bilinear", align_corners=False)
    return spread.flatten(2).transpose(1, 2)


class CellImageEncoder(PromptedImageEncoder):
    """The prompted image tower with cell tokens after the patches, which have no position."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__(config)
        self.region_level_bridge = nn.Parameter(torch.zeros(config.num_cells, config.width))

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class, patch and cell tokens after ``ln_pre``, ``[B, 1 + N + R, W]``."""
        cells = self.region_level_bridge.expand(image.shape[0], -1, -1)
        return self.ln_pre(torch.cat([self.input_tokens(image), cells], dim=1))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> ImageEmbeds:
        tokens, num_cells = self.embed_patches(image), self.config.num_cells
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))
        official = grid_hw == (self.config.grid_side,) * 2  # as in the official code; else even

        def mask_of(num_prompts: int) -> Tensor:
            allowed = attention_allowed(grid_hw, num_cells, num_prompts, official=official)
            return allowed.to(image.device)

        cls_token, prompts, others = self.run_blocks(tokens, mask_of)
        seeing_all = torch.cat([cls_token, prompts, others[:, :-num_cells]], dim=1)
        normed = self.prompt_norm(seeing_all)
        embeds = self.project(torch.cat([normed, others[:, -num_cells:]], dim=1))
        patches = embeds[:, 1 + prompts.shape[1] : -num_cells]
        return ImageEmbeds(unit(patches), unit(embeds[:, 0]), unit(embeds[:, -num_cells:]))


@dataclass(frozen=True, kw_only=True)
class ClipRCConfig(ZegCLIPConfig):
    """Everything that defines a CLIP-RC model besides its weights."""

    image_encoder: ImageEncoderConfig = field(
        default_factory=lambda: ImageEncoderConfig(num_cells=16)
    )
    # Whether the model has the recovery decoder, which runs in training only
    with_recovery: bool = True


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

    def forward(
        self, embeds: ImageEmbeds, grid_hw: tuple[int, int], text_embeds: Tensor
    ) -> tuple[Tensor, Recovery | None]:
        """Mask logits ``[B, C, N]``, and in training the output of a recovery decoder."""
        assert embeds.cell_embeds is not None
        whole = embeds.cls_embed[:, None]
        cells = embeds.cell_embeds + whole
        described = describe(cells.flatten(0, 1), text_embeds)  # every cell with every class
        described = torch.unflatten(described, 0, cells.shape[:2]).flatten(1, 2)
        spread = upsample_cells(embeds.cell_embeds, grid_hw)
        joined = torch.cat([spread, whole.expand_as(spread), embeds.patch_embeds], dim=-1)
        queries, patches = self.q_proj(described), self.lateral_proj(joined)
        layers = zip(self.decoder_q.layers, self.decoder_v.layers, strict=True)
        for query_layer, patch_layer in layers:
            queries, patches = query_layer(queries, patches), patch_layer(patches, queries)
        by_cell = torch.unflatten(queries, 1, (-1, len(text_embeds)))
        # The mean over cells commutes with the product: R times fewer multiplications in it.
        mask_logits = patch_text_similarity(patches, by_cell.mean(dim=1), normalize=False)
        if self.recovery_decoder is None or not self.training:
            return mask_logits, None
        targets = described.detach(), embeds.patch_embeds.detach()
        queries, patches = self.recovery_decoder(queries, patches)
        return mask_logits, Recovery(queries, patches, *targets)


class ClipRC(DescriptorModel):
    """The complete model. The official code only takes 512x512 pixels; here any size works."""

    architecture = "clip_rc"
    config: ClipRCConfig
    backbone: CellImageEncoder
    decode_head: CellDecodeHead

    def __init__(self, config: ClipRCConfig) -> None:
        encoder = config.image_encoder
        head = CellDecodeHead(config.decoder, encoder.embed_dim, with_recovery=config.with_recovery)
        super().__init__(config, CellImageEncoder(encoder), head)


# --- from CLIP weights, to be trained, and from official checkpoints ---

_TEXT = "text_encoder."
_UNUSED = r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode\..*)"


@dataclass(frozen=True, kw_only=True)
class ZegCLIPStart(ClipSource):
    """Starts ZegCLIP from CLIP weights, positions resized to ``image_size`` (bilinear)."""

    made: ClassVar[Any] = ZegCLIP
    made_config: ClassVar[Any] = ZegCLIPConfig

    num_prompts: int = 10  # Visual prompts per layer; officially 10 for VOC, 100 for COCO-Stuff
    image_size: int = 512  # Side of training crops, in pixels; a multiple of the patch size
    # Pixels from one patch to the next, such as half the patch size for four times as many patches;
    # None is the patch size, as officially
    patch_stride: int | None = None
    # Sizes of the decoders; None is the official ones at CLIP's embedding width
    decoder: DecoderConfig | None = None
    seen_classes: Sequence[int] = ()  # Rows of the text embeddings that are trained on
    # Whether training is self-training; see ZegCLIPConfig
    self_trained: bool = False
    # Whether initial weights are scaled for the unit vectors that they read, for short trainings;
    # see scale_for_unit_inputs. Not official
    unit_inputs: bool = False
    # Initial weights of the decoder's layers: "random", or "copies" of the first layer, as
    # officially
    start: Literal["random", "copies"] = "random"

    def build(self) -> DescriptorModel:
        check_choice("start", self.start, ("random", "copies"))
        weights = self.load()
        encoder = self._encoder(weights)
        check_size((self.image_size, self.image_size), encoder.patch_size)
        sizes = DecoderConfig(query_dim=encoder.embed_dim, ffn_dim=4 * encoder.embed_dim)
        fields = {"decoder": sizes, **shared_fields(self, self.made_config)}
        grid, deep = self.image_size // encoder.stride, encoder.num_layers - 1
        encoder = replace(
            encoder, grid_side=grid, num_prompts=self.num_prompts, num_deep_prompts=deep
        )
        text = text_config(weights)
        config = self.made_config(image_encoder=encoder, text_encoder=text, **fields)
        model: DescriptorModel = start_from_clip(self.made(config), weights, "backbone")
        head: Any = model.decode_head
        if self.unit_inputs:
            head.scale_for_unit_inputs()
        stacks = [part for part in head.children() if isinstance(part, DecoderStack)]
        for stack in stacks if self.start == "copies" else ():
            stack.copy_first_layer()
        return model

    def _encoder(self, weights: ClipTensors) -> ImageEncoderConfig:
        return replace(image_config(weights), patch_stride=self.patch_stride)


@dataclass(frozen=True, kw_only=True)
class ClipRCStart(ZegCLIPStart):
    """Starts CLIP-RC. Every cell token starts, and stays, as class embedding with its position."""

    made, made_config = ClipRC, ClipRCConfig

    num_cells: int = 16  # Cell tokens, a square number

    @torch.no_grad()
    def build(self) -> DescriptorModel:
        if self.num_cells < 1 or math.isqrt(self.num_cells) ** 2 != self.num_cells:
            raise ArgumentError(
                f"num_cells: expected a square number of at least 1, got {self.num_cells}. "
                "Officially it is 16."
            )
        model = super().build()
        tower: Any = model.backbone
        tower.region_level_bridge.copy_(tower.class_embedding + tower.positional_embedding[0])
        return model

    def _encoder(self, weights: ClipTensors) -> ImageEncoderConfig:
        return replace(super()._encoder(weights), num_cells=self.num_cells)


@dataclass(frozen=True, kw_only=True)
class OfficialZegCLIP:
    """Builds ZegCLIP from an official checkpoint; sizes are read from shapes."""

    made: ClassVar[Any] = ZegCLIP
    made_config: ClassVar[Any] = ZegCLIPConfig
    layers: ClassVar[str] = "decode_head.decoder_1.layers."

    num_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    decoder_heads: int = 8  # Heads of the decoder
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    # Side in pixels that masks are upsampled to before the sigmoid; None is the size the positional
    # embedding is stored for (512 officially)
    image_size: int | None = None
    # Rows of the text embeddings whose classes were trained on. Official: 0 to 14 for VOC, the 156
    # seen classes for COCO-Stuff. Empty: predict lowers no score
    seen_classes: Sequence[int] = ()
    # Whether the weights come from self-training; then no score is lowered
    self_trained: bool = False
    prompt_dropout: float = 0.1  # Dropout on the projected prompts, in training
    decoder_dropout: float = 0.1  # Dropout in the decoder's layers, in training

    def build(self, state_dict: Mapping[str, Tensor]) -> DescriptorModel:
        """Make the model of official keys, float32; the weights are copies."""
        name: str = self.made.architecture
        check_float32(state_dict, name)
        sizes = check_descriptor(state_dict, name)
        file = Checked(tensors=state_dict, what=name)
        encoder = replace(
            image_encoder_config(file, "backbone.", self.num_heads),
            num_prompts=sizes["X"],
            num_deep_prompts=sizes["Y"],
            prompt_dropout=self.prompt_dropout,
            num_cells=sizes.get("C", 0),
        )
        decoder = DecoderConfig(
            query_dim=sizes["Q"],
            num_layers=file.depth(self.layers),
            num_heads=divisor("decoder_heads", self.decoder_heads, sizes["Q"]),
            ffn_dim=sizes["H"],
            dropout=self.decoder_dropout,
        )
        has_text = file.has(_TEXT)
        text = text_encoder_config(file, _TEXT, self.text_heads) if has_text else None
        fields = {"image_size": encoder.side, **shared_fields(self, self.made_config)}
        if self.made is ClipRC:
            fields["with_recovery"] = file.has("decode_head.recovery_decoder.")
        config = self.made_config(
            image_encoder=encoder, decoder=decoder, text_encoder=text, **fields
        )
        make: Callable[[Any], DescriptorModel] = self.made
        return load_into(make, config, state_dict, architecture=name, ignored=(_UNUSED,))


@dataclass(frozen=True, kw_only=True)
class OfficialClipRC(OfficialZegCLIP):
    """Builds CLIP-RC, with a recovery decoder if the checkpoint holds one."""

    made, made_config = ClipRC, ClipRCConfig
    layers = "decode_head.decoder_q.layers."
