"""ZegFormer's backbone and decoders: segments, and what CLIP sees of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common.checks import check_choice, check_range
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.clip.towers import (
    Attention,
    ImageEncoder,
    ImageEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
    attend,
)
from zsseg_rt.networks.zegformer import sine_positions

BackboneNorm = Literal["frozen", "learned"]

_EXPANSION = 4  # a bottleneck outputs four times its inner width


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet; the defaults are ResNet-50's."""

    stem_width: int = 64  # Channels of the stem
    # Inner width of the bottlenecks of each stage; a stage outputs four times as many channels
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 6, 3)  # Bottlenecks per stage
    # Batch norms are constants ("frozen", official) or learn ("learned", to train without
    # pretrained weights). In evaluation both are the same, and so are their names
    norm: BackboneNorm = "frozen"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, get_args(BackboneNorm))
        check_range(self, "stem_width", "widths", "depths", least=1)
        if len(self.widths) != len(self.depths):
            raise ArgumentError(
                f"widths: expected a width and a depth per stage, got widths {self.widths} and "
                f"depths {self.depths}."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(_EXPANSION * width for width in self.widths)


class BatchNorm(nn.Module):
    """Batch norm without torch's counter, whose tensors are constants ("frozen") or learn.

    In evaluation both are the same. In training each process normalises its own share of a batch.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, norm: BackboneNorm) -> None:
        super().__init__()
        self.learns = norm == "learned"
        for name, value in (("weight", torch.ones), ("bias", torch.zeros)):
            if self.learns:
                self.register_parameter(name, nn.Parameter(value(num_channels)))
            else:
                self.register_buffer(name, value(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``[B, C, H, W]``."""
        parts = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parts, training=self.learns and self.training)


class NormedConv(nn.Conv2d):
    """A convolution without bias, followed by a norm; padding keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: nn.Module,
        stride: int = 1,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


class _Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1; the shortcut is projected where channels change."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: BackboneNorm) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.conv1 = NormedConv(in_channels, width, 1, BatchNorm(width, norm))
        self.conv2 = NormedConv(width, width, 3, BatchNorm(width, norm), stride)
        self.conv3 = NormedConv(width, out_channels, 1, BatchNorm(out_channels, norm))
        self.shortcut = (
            None
            if in_channels == out_channels and stride == 1
            else NormedConv(in_channels, out_channels, 1, BatchNorm(out_channels, norm), stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet of bottlenecks, stride in the 3x3 convolution."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        width = config.stem_width
        first = NormedConv(3, width, 7, BatchNorm(width, config.norm), stride=2)
        self.stem = nn.ModuleDict({"conv1": first})
        in_channels = config.stem_width
        self.stage_names = [f"res{index + 2}" for index in range(len(config.widths))]
        for index, name in enumerate(self.stage_names):
            width, norm = config.widths[index], config.norm
            blocks = [_Bottleneck(in_channels, width, 1 if index == 0 else 2, norm)]
            in_channels = config.channels[index]
            blocks += [
                _Bottleneck(in_channels, width, 1, norm) for _ in range(1, config.depths[index])
            ]
            self.add_module(name, nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Feature maps of ``[B, 3, H, W]``, one per stage: strides 4, 8, 16, 32, finest first."""
        x = F.relu(self.stem["conv1"](image))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps


RegionStyle = Literal["cropmask", "mask", "crop"]
REGION_STYLES: tuple[str, ...] = get_args(RegionStyle)


class Clip(TextEncoder):
    """Both towers of CLIP, named as in OpenAI's files; calling it embeds prompts."""

    def __init__(self, visual: ImageEncoderConfig, text: TextEncoderConfig) -> None:
        super().__init__(text)
        self.visual = ImageEncoder(visual)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    @property
    def image_side(self) -> int:
        """Side in pixels of the images that the image tower was trained on."""
        return self.visual.config.side


def crop_regions(image: Tensor, mask_logits: Tensor, *, style: RegionStyle, side: int) -> Tensor:
    """Cut out what CLIP is shown of each segment, ``[K, 3, side, side]``.

    Of normalised planes ``[3, H, W]`` and mask logits ``[K, h, w]`` of any resolution; for the
    styles see :func:`zsseg_rt.ops.crop_regions`.
    """
    planes, masks = (x.detach().float().cpu().contiguous().numpy() for x in (image, mask_logits))
    boxes, regions = ops.mask_boxes(masks, planes.shape[1:]), np.arange(len(masks), dtype=np.int32)
    crops = ops.crop_regions(planes, masks, regions, boxes, side=side, style=style)
    return torch.from_numpy(np.asarray(crops)).to(image)


NUM_GROUPS = 32  # of every GroupNorm in the pixel decoder


@dataclass(frozen=True, kw_only=True)
class QueryDecoderConfig:
    """Sizes of the two decoders; the defaults are official."""

    conv_dim: int = 256  # Channels of the pixel decoder
    mask_dim: int = 256  # Channels of the mask features
    hidden_dim: int = 256  # Query width
    num_queries: int = 100  # Queries Q, each of which proposes one segment
    num_layers: int = 6  # Layers of the query decoder
    num_heads: int = 8  # Attention heads
    ffn_dim: int = 2048  # Hidden width of the feed-forward networks
    mask_layers: int = 3  # Layers of the network that makes mask embeddings
    embed_dim: int = 512  # Width D of the joint image-text space
    dropout: float = 0.1  # Dropout after attentions and in feed-forward networks, in training


class PixelDecoder(nn.Module):
    """Feature pyramid from stride 32 to stride 4."""

    def __init__(self, channels: tuple[int, ...], conv_dim: int, mask_dim: int) -> None:
        super().__init__()
        self.num_laterals = len(channels) - 1
        for index, width in enumerate(channels[:-1], start=1):
            norm = nn.GroupNorm(NUM_GROUPS, conv_dim)
            self.add_module(f"adapter_{index}", NormedConv(width, conv_dim, 1, norm))
        for index in range(1, len(channels) + 1):
            width = channels[-1] if index == len(channels) else conv_dim
            norm = nn.GroupNorm(NUM_GROUPS, conv_dim)
            self.add_module(f"layer_{index}", NormedConv(width, conv_dim, 3, norm))
        self.mask_features = nn.Conv2d(conv_dim, mask_dim, kernel_size=3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Merge the backbone's maps, finest first, into mask features ``[B, mask_dim, h, w]``."""
        y = F.relu(self.get_submodule(f"layer_{len(maps)}")(maps[-1]))
        for index in range(self.num_laterals, 0, -1):
            lateral = self.get_submodule(f"adapter_{index}")(maps[index - 1])
            y = lateral + F.interpolate(y, size=lateral.shape[2:], mode="nearest")
            y = F.relu(self.get_submodule(f"layer_{index}")(y))
        return self.mask_features(y)  # type: ignore[no-any-return]


class _PackedAttention(Attention):
    """Attention with one packed projection (rows q, k, v) of three different inputs."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__(width, num_heads)
        self.dropout = dropout
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(  # type: ignore[override]
        self, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias)
            for x, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, k, v, self.num_heads, dropout=dropout))  # type: ignore[no-any-return]


class _DecoderLayer(nn.Module):
    """Self attention, cross attention, feed-forward network; a norm after each."""

    def __init__(self, config: QueryDecoderConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.dropout = config.dropout
        self.self_attn = _PackedAttention(width, config.num_heads, config.dropout)
        self.multihead_attn = _PackedAttention(width, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(width, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self._drop(self.self_attn(placed, placed, x)))
        x = self.norm2(x + self._drop(self.multihead_attn(x + positions, keys, memory)))
        hidden = self._drop(F.relu(self.linear1(x)))
        return self.norm3(x + self._drop(self.linear2(hidden)))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class QueryDecoder(nn.Module):
    """Transformer decoder whose queries start at zero and are told apart by their positions."""

    def __init__(self, config: QueryDecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, query_positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """The queries after each layer, ``[layers, B, Q, W]``, of positions ``[Q, W]``."""
        positions = query_positions.expand(memory.shape[0], -1, -1)
        keys = memory + memory_positions
        x = torch.zeros_like(positions)
        outputs = []
        for layer in self.layers:
            x = layer(x, positions, keys, memory)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class _MaskEmbed(nn.Module):
    def __init__(self, config: QueryDecoderConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim] * config.mask_layers + [config.mask_dim]
        self.layers = nn.ModuleList(
            nn.Linear(widths[index], widths[index + 1]) for index in range(config.mask_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


class Segments(NamedTuple):
    """Proposals of the queries; leading axes are those of the queries."""

    logits: Tensor  # [..., B, Q, C + 1]; the last column is "no object"
    masks: Tensor  # Mask logits at stride 4, [..., B, Q, h, w]


class SegmentPredictor(nn.Module):
    """The queries, and the segments read from them."""

    def __init__(
        self, config: QueryDecoderConfig, in_channels: int, clip: Clip | None = None
    ) -> None:
        super().__init__()
        self.clip_model = clip
        width = config.hidden_dim
        self.bg_feature = nn.Parameter(torch.empty(1, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(100.0)), requires_grad=False)
        self.projection_layer = nn.Linear(width, config.embed_dim)
        self.transformer = nn.ModuleDict({"decoder": QueryDecoder(config)})  # no encoder
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.input_proj = nn.Conv2d(in_channels, width, kernel_size=1)
        self.mask_embed = _MaskEmbed(config)
        nn.init.kaiming_uniform_(self.bg_feature, a=math.sqrt(5))

    def decode(self, coarse_map: Tensor) -> Tensor:
        """Queries after each decoder layer, ``[layers, B, Q, W]``."""
        projected = self.input_proj(coarse_map)
        grid_hw = (projected.shape[2], projected.shape[3])
        positions = torch.from_numpy(sine_positions(grid_hw, projected.shape[1])).to(projected)
        memory = projected.flatten(2).transpose(1, 2)
        decoder = self.transformer["decoder"]
        return cast(Tensor, decoder(self.query_embed.weight, memory, positions))

    def forward(self, queries: Tensor, mask_features: Tensor, text_features: Tensor) -> Segments:
        """Read segments from queries ``[..., B, Q, W]``, of one layer or all."""
        embeds = self.projection_layer(queries)
        embeds = embeds / torch.linalg.vector_norm(embeds, dim=-1, keepdim=True)
        # "No object" is not normalised, as in the official code.
        classes = torch.cat([text_features.to(embeds), self.bg_feature])
        logits = self.logit_scale.exp() * (embeds @ classes.T)
        masks = self.mask_embed(queries) @ mask_features.flatten(2)
        return Segments(logits, torch.unflatten(masks, -1, mask_features.shape[2:]))
