"""CAT-Seg's head: every class's correlation map, refined in space and against other classes.

Module and parameter names are the official checkpoints'.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.clip.towers import attend
from zsseg_rt.networks.cat_seg import NUM_LAYERS, shift_mask, window_order

DROPPED_LOGIT = -100.0
"""The logit of classes that the head did not look at."""


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig:
    """Sizes of the head; the defaults are CAT-Seg B's."""

    embed_dim: int = 512  # Width D of the joint space
    width: int = 768  # Trunk width W
    hidden: int = 128  # Channels of a class's map
    num_heads: int = 4  # Heads, in space and between classes
    window: int = 12  # Side of an attention window, in patches
    text_guidance: int = 128  # Width of the classes' guidance
    guidance: int = 128  # Width of the image's guidance
    decoder: tuple[int, int] = (64, 32)  # Channels of the two decoder stages
    up: tuple[int, int] = (256, 128)  # Channels of the two upsampled taps
    decoder_guidance: tuple[int, int] = (32, 16)  # Channels of these beside the decoder's
    padding: int = 256  # Classes that shorter vocabularies are padded to

    def __post_init__(self) -> None:
        """Check the sizes, by themselves and against each other."""
        for name, value in vars(self).items():
            sizes = value if isinstance(value, tuple) else (value,)
            least = 0 if name == "padding" else 1
            if min(sizes) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {value}. Use more.")
        if self.hidden % self.num_heads:
            raise ArgumentError(
                f"hidden: expected a multiple of num_heads = {self.num_heads}, got {self.hidden}. "
                "Officially they are 128 and 4."
            )
        if any(size % 16 for size in self.decoder):
            raise ArgumentError(
                f"decoder: expected multiples of 16, the channels that are normalised together, "
                f"got {self.decoder}. Officially they are 64 and 32."
            )
        inputs = (self.hidden, self.decoder[0])
        if any(map(operator.ge, self.decoder_guidance, inputs)):
            raise ArgumentError(
                f"decoder_guidance: expected less than what the stages take, {inputs}, got "
                f"{self.decoder_guidance}. Officially they are 32 and 16."
            )


class Guidance(NamedTuple):
    """What the head takes from an image besides correlations: ``[B, ., g, g]`` and its multiples.

    Attributes:
        near: Of the patches' embeddings.
        fine: Of the taps, at two and at four times the grid.
    """

    near: Tensor
    fine: tuple[Tensor, Tensor]


def sum_linear(linear: nn.Module, own: Tensor, shared: Tensor) -> Tensor:
    """A layer of ``[own, shared]``, where ``shared`` is broadcast: its part is computed once."""
    layer, width = cast(nn.Linear, linear), own.shape[-1]
    rest = F.linear(shared, layer.weight[:, width:], layer.bias)
    return F.linear(own, layer.weight[:, :width]) + rest


class SwinBlock(nn.Module):
    """Attention within windows, steered by the image, then an MLP; ``[B, C, N, h]`` to the same."""

    def __init__(self, config: AggregatorConfig, shift: int) -> None:
        super().__init__()
        hidden, guided = config.hidden, config.hidden + config.guidance
        self.window, self.shift, self.num_heads = config.window, shift, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = nn.ModuleDict(
            {name: nn.Linear(guided if name in "qk" else hidden, hidden) for name in "qkv"}
            | {"proj": nn.Linear(hidden, hidden)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(hidden, 4 * hidden), "fc2": nn.Linear(4 * hidden, hidden)}
        )

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """``guidance`` is ``[B, 1, N, G]``."""
        grid = int(x.shape[2] ** 0.5)
        order = torch.from_numpy(window_order(grid, self.window, self.shift)).to(x.device)
        y, guidance = self.norm1(x)[:, :, order], guidance[:, :, order]
        guided = (sum_linear(self.attn[name], y, guidance) for name in "qk")
        q, k, v = (part.unflatten(2, (-1, self.window**2)) for part in (*guided, self.attn["v"](y)))
        mask = None
        if self.shift:
            mask = torch.from_numpy(shift_mask(grid, self.window, self.shift)).to(x)[:, None]
        mixed = attend(q, k, v, self.num_heads, mask=mask)
        mixed = mixed.flatten(2, 3)[:, :, order.argsort()]
        x = x + self.attn["proj"](mixed)
        return cast(Tensor, x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ClassAttention(nn.Module):
    """Linear attention between the classes of a pixel; ``[B, C, N, h]`` to the same.

    Vocabularies below ``padding`` classes are padded with copies of one learned token; its keys and
    values are constants, so they are added as often as it is missing.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        hidden, guided = config.hidden, config.hidden + config.text_guidance
        self.num_heads, self.padding = config.num_heads, config.padding
        self.pooling = 1  # in training, officially 2: looks at means of so many cells a side
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, hidden))
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, config.text_guidance))
        self.attention = nn.ModuleDict(
            {name: nn.Linear(guided if name in "qk" else hidden, hidden) for name in "qkv"}
        )
        self.MLP = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden)
        )
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def keys_values(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[..., heads, h / heads]`` of tokens with their guidance."""
        y = self.norm1(x)
        q, k = (F.elu(sum_linear(self.attention[name], y, text)) + 1.0 for name in "qk")
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)) for p in (q, k, self.attention["v"](y)))
        return q, k, v

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """``text`` is ``[C, T]``."""
        if self.pooling == 1 or not self.training:
            return x + self.refined(x, text)  # its input counts twice, as officially
        side = int(x.shape[2] ** 0.5)
        small = F.avg_pool2d(_as_maps(x, side), self.pooling).flatten(2).transpose(1, 2)
        small = self.refined(small.reshape(*x.shape[:2], *small.shape[1:]), text)
        maps = _as_maps(small, side // self.pooling)
        raised = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=True)
        return x + raised.flatten(2).transpose(1, 2).reshape(x.shape)

    def refined(self, x: Tensor, text: Tensor) -> Tensor:
        """Tokens after attention and MLP."""
        q, k, v = self.keys_values(x, text[:, None])
        missing = max(0, self.padding - x.shape[1])
        _, pad_k, pad_v = self.keys_values(self.padding_tokens[0, 0], self.padding_guidance[0, 0])
        products = torch.einsum("bcnhd,bcnhe->bnhde", k, v)
        products = products + missing * pad_k[:, :, None] * pad_v[:, None]
        totals = k.sum(1) + missing * pad_k
        weights = torch.einsum("bcnhd,bnhd->bcnh", q, totals) + 1e-6
        mixed = torch.einsum("bcnhd,bnhde->bcnhe", q, products) / weights[..., None]
        refined = x + mixed.flatten(-2)
        return cast(Tensor, refined + self.MLP(self.norm2(refined)))


class AggregatorLayer(nn.Module):
    """Two window blocks, the second shifted, then attention between classes."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        shifts = {"block_1": 0, "block_2": config.window // 2}
        blocks: dict[str, nn.Module] = {n: SwinBlock(config, s) for n, s in shifts.items()}
        self.swin_block = nn.ModuleDict(blocks | {"guidance_norm": nn.LayerNorm(config.guidance)})
        self.attention = ClassAttention(config)

    def forward(self, x: Tensor, near: Tensor, text: Tensor) -> Tensor:
        """``x`` ``[B, C, N, h]``, ``near`` ``[B, N, G]``, ``text`` ``[C, T]``."""
        guidance = self.swin_block["guidance_norm"](near)[:, None]
        for name in ("block_1", "block_2"):
            x = self.swin_block[name](x, guidance)
        return cast(Tensor, self.attention(x, text))


class UpBlock(nn.Module):
    """Doubles a class's map, beside the image's guidance."""

    def __init__(self, inputs: int, outputs: int, guidance: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance, 2, stride=2)
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.GroupNorm(outputs // 16, outputs),
                nn.ReLU(),
            ]
        self.conv = nn.ModuleDict({"double_conv": nn.Sequential(*layers)})

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """``x`` ``[B * C, inputs, g, g]``, ``guidance`` ``[B, guidance, 2g, 2g]``.

        The first convolution of ``[up(x), guidance]`` is a sum: what ``x`` adds is one transposed
        convolution, and the rest, of ``up``'s bias and the guidance, is the same for all classes.
        """
        first, *rest = cast(nn.Sequential, self.conv["double_conv"])
        bias = cast(Tensor, self.up.bias)[:, None, None].expand(-1, *guidance.shape[2:])
        shared = first(torch.cat([bias.expand(len(guidance), -1, -1, -1), guidance], dim=1))
        own: Tensor = F.conv_transpose2d(x, self.raising_kernel(), stride=2, padding=1)
        maps = own.reshape(len(guidance), -1, *own.shape[1:]) + shared[:, None]
        return cast(Tensor, nn.Sequential(*rest)(maps.flatten(0, 1)))

    def raising_kernel(self) -> Tensor:
        """Of the upsampling and the convolution behind it, ``[inputs, outputs, 4, 4]``."""
        first: Any = cast(nn.Sequential, self.conv["double_conv"])[0]
        return F.conv2d(self.up.weight, first.weight[:, : self.up.out_channels], padding=2)


class Aggregator(nn.Module):
    """From correlations ``[B, C, g, g]`` to logits ``[B, C, 4g, 4g]``."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        hidden, first, second = config.hidden, *config.decoder
        self.conv1 = nn.Conv2d(1, hidden, 7, padding=3)
        self.guidance_projection = _conv3(config.embed_dim, config.guidance)
        self.text_guidance_projection = nn.Sequential(
            nn.Linear(config.embed_dim, config.text_guidance), nn.ReLU()
        )
        self.decoder_guidance_projection = nn.ModuleList(
            map(_conv3, config.up, config.decoder_guidance)
        )
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(NUM_LAYERS))
        self.decoder1 = UpBlock(hidden, first, config.decoder_guidance[0])
        self.decoder2 = UpBlock(first, second, config.decoder_guidance[1])
        self.head = nn.Conv2d(second, 1, 3, padding=1)

    def guide(self, features: Tensor, taps: tuple[Tensor, Tensor]) -> Guidance:
        """What does not depend on classes, from features ``[B, D, g, g]`` and upsampled taps."""
        two, four = (p(t) for p, t in zip(self.decoder_guidance_projection, taps, strict=True))
        return Guidance(self.guidance_projection(features), (two, four))

    def forward(self, correlation: Tensor, guidance: Guidance, text: Tensor) -> Tensor:
        """``text`` is unit rows ``[C, D]``."""
        batch, classes, grid, _ = correlation.shape
        named = self.text_guidance_projection(text)
        x = self.conv1(correlation.flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (batch, classes))
        near = guidance.near.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, near, named)
        maps = _as_maps(x, grid)
        for decoder, fine in zip((self.decoder1, self.decoder2), guidance.fine, strict=True):
            maps = decoder(maps, fine)
        logits: Any = self.head(maps)
        return cast(Tensor, logits[:, 0].unflatten(0, (batch, classes)))


def _as_maps(x: Tensor, side: int) -> Tensor:
    """``[B, C, N, h]`` to ``[B * C, h, g, g]``."""
    return x.flatten(0, 1).transpose(1, 2).reshape(-1, x.shape[3], side, side)


def _conv3(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
