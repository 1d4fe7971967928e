"""CAT-Seg cut into a class-free image encoder, the vocabulary's own terms, and the head.

All folds are exact: queries and keys are sums of a part of the class and a part of the image or the
name; the first convolution of a decoder stage is a sum, too; an upsampling and the convolution
behind it are one transposed convolution and a map that its bias leaves; padding tokens are
constants, counted by ``padding``. Tokens stay in the order of the windows between attentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.export.folded.clip import FoldedBlock, linear_from
from zsseg_rt.models.cat_seg.aggregator import (
    AggregatorConfig,
    ClassAttention,
    SwinBlock,
    UpBlock,
    shift_mask,
    window_order,
)
from zsseg_rt.models.cat_seg.model import CatSeg
from zsseg_rt.models.clip.image_encoder import unit
from zsseg_rt.models.clip.text_encoder import TextEncoder
from zsseg_rt.models.clip.transformer import ResidualBlock

_VALUE_SCALE = 1 / 256  # keeps sums over classes within float16; a power of two


@dataclass(frozen=True, kw_only=True)
class CatSegParts:
    """What a CAT-Seg is exported as.

    Attributes:
        image_encoder: From image to ``patch_embeds``, ``spatial``, ``near_map`` and ``far_map``.
        head: From these and the vocabulary to logits.
        weights: What the vocabulary's own terms are made with, by name.
        grid: Side of the patch grid.
    """

    image_encoder: FoldedViewEncoder
    head: FoldedHead
    weights: Mapping[str, Tensor]
    grid: int


@torch.no_grad()
def fold_cat_seg(model: CatSeg) -> CatSegParts:
    """Split a model; the parts share unchanged weights with it."""
    encoder = FoldedViewEncoder(model).eval()
    return CatSegParts(
        image_encoder=encoder,
        head=FoldedHead(model, encoder.grid).eval(),
        weights=_vocabulary_weights(model),
        grid=encoder.grid,
    )


def packed_text_encoder(encoder: TextEncoder) -> TextEncoder:
    """The tower with packed projections, which need no copy at run time."""
    with torch.device("meta"):
        packed = TextEncoder(encoder.config)
    state = dict(encoder.state_dict())
    for index, block in enumerate(cast("list[ResidualBlock]", encoder.transformer.resblocks)):
        stem = f"transformer.resblocks.{index}.attn."
        state = {
            k: v
            for k, v in state.items()
            if k[len(stem) :][1:] != "_proj_weight" or not k.startswith(stem)
        }
        state[stem + "in_proj_weight"] = block.attn.in_proj_weight.detach()
    packed.load_state_dict(state, assign=True)
    return packed.eval()


def _vocabulary_weights(model: CatSeg) -> dict[str, Tensor]:
    head, hidden = model.aggregator, model.config.aggregator.hidden
    project = cast(nn.Linear, head.text_guidance_projection[0])
    parts = [
        cast(nn.Linear, cast(ClassAttention, cast(Any, layer).attention).attention[name])
        for layer in head.layers
        for name in "qk"
    ]
    found = {
        "text_guidance.weight": project.weight,
        "text_guidance.bias": project.bias,
        "class_halves.weight": torch.cat([part.weight[:, hidden:] for part in parts]),
        "class_halves.bias": torch.cat([part.bias for part in parts]),
    }
    return {name: value.detach().contiguous() for name, value in found.items()}


class FoldedViewEncoder(nn.Module):
    """From an image to all that the head takes of it, whatever the classes.

    ``image`` ``[1, 3, v, v]`` to ``patch_embeds`` ``[1, N, D]``, unit norm; ``spatial``
    ``[8, N, h]``, for both layers and both blocks what the image adds to queries and keys, in the
    order of the block's windows; ``near_map`` and ``far_map`` ``[1, ., 2g, 2g]`` and
    ``[1, ., 4g, 4g]``, what the image and biases add in the decoder.
    """

    positions: Tensor
    cls_token: Tensor
    proj: Tensor
    near_bias: Tensor
    far_bias: Tensor

    def __init__(self, model: CatSeg) -> None:
        super().__init__()
        encoder, head = model.image_encoder, model.aggregator
        self.taps, self.config = model.config.taps, model.config.aggregator
        self.grid = model.config.view // encoder.config.patch_size
        blocks = list(cast("list[ResidualBlock]", encoder.transformer.resblocks))
        self.conv1, self.ln_pre, self.ln_post = encoder.conv1, encoder.ln_pre, encoder.ln_post
        nothing = torch.empty(0, encoder.config.width)
        self.blocks = nn.ModuleList(FoldedBlock(block, nothing) for block in blocks[:-1])
        self.register_buffer("positions", encoder.patch_positions((self.grid, self.grid)).clone())
        self.register_buffer("cls_token", encoder.ln_pre(encoder.class_token())[None, None])
        self.register_buffer("proj", encoder.proj.detach())
        self.last = blocks[-1]
        attention = self.last.attn
        weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        out = attention.out_proj
        self.value = linear_from(out.weight @ weight, out.bias + out.weight @ bias)
        self.raise_near, self.raise_far = model.upsample1, model.upsample2
        self.guidance_projection = head.guidance_projection
        self.decoder_guidance = head.decoder_guidance_projection
        self._fold_spatial(model)
        for name, decoder, side in (
            ("near", head.decoder1, 2 * self.grid),
            ("far", head.decoder2, 4 * self.grid),
        ):
            kernel, lifted = _first_kernel(decoder)
            flat = cast(Tensor, decoder.up.bias).view(1, -1, 1, 1).expand(1, -1, side, side)
            bias = F.conv2d(flat, kernel[:, :lifted], padding=1)
            self.register_buffer(f"{name}_bias", bias.detach())
            self.register_buffer(f"{name}_kernel", kernel[:, lifted:].detach().contiguous())

    def _fold_spatial(self, model: CatSeg) -> None:
        config = self.config
        norms: list[nn.Module] = []
        halves: list[nn.Module] = []
        scale = (config.hidden // config.num_heads) ** -0.5
        for layer in cast("list[Any]", model.aggregator.layers):
            norms.append(layer.swin_block["guidance_norm"])
            for name in ("block_1", "block_2"):
                block = cast(SwinBlock, layer.swin_block[name])
                order = window_order(self.grid, config.window, block.shift)
                self.register_buffer(f"order_{len(halves) // 2}", order)
                for part, factor in (("q", scale), ("k", 1.0)):
                    linear = cast(nn.Linear, block.attn[part])
                    weight = linear.weight[:, config.hidden :] * factor
                    halves.append(linear_from(weight, linear.bias * factor))
        self.guidance_norms, self.halves = nn.ModuleList(norms), nn.ModuleList(halves)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        patches = self.ln_pre(self.conv1(image).flatten(2).transpose(1, 2) + self.positions)
        x = torch.cat([self.cls_token, patches], dim=1)
        kept = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                kept.append(self._map(x[:, 1:]))
        x = self.value(self.last.ln_1(x[:, 1:])) + x[:, :1]
        x = x + self.last.mlp(self.last.ln_2(x))
        features = self.ln_post(x) @ self.proj
        near = self.guidance_projection(self._map(features)).flatten(2).squeeze(0).T
        spatial = []
        for index, half in enumerate(self.halves):
            guidance = self.guidance_norms[index // 4](near)
            order = self.get_buffer(f"order_{index // 2}")
            spatial.append(torch.index_select(half(guidance), 0, order))
        fine = [
            F.conv2d(project(up(tap)), self.get_buffer(f"{name}_kernel"), padding=1)
            + self.get_buffer(f"{name}_bias")
            for project, up, tap, name in zip(
                self.decoder_guidance,
                (self.raise_near, self.raise_far),
                kept,
                ("near", "far"),
                strict=True,
            )
        ]
        return unit(features), torch.stack(spatial), fine[0], fine[1]

    def _map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(1, -1, self.grid, self.grid)


def _first_kernel(decoder: UpBlock) -> tuple[Tensor, int]:
    """A stage's first kernel, and how many of its inputs come from the class."""
    first: Any = cast(nn.Sequential, decoder.conv["double_conv"])[0]
    return first.weight, decoder.up.out_channels


class FoldedHead(nn.Module):
    """From an image's parts and the vocabulary's to logits ``[1, C, 4g, 4g]``.

    ``class_halves`` ``[C, 4 h]``: what a name adds to queries and keys of both layers; -1e4 for
    keys makes a class that counts for no other. ``padding`` ``[1]``: missing classes.
    """

    def __init__(self, model: CatSeg, grid: int) -> None:
        super().__init__()
        head, config = model.aggregator, model.config.aggregator
        self.grid, self.hidden = grid, config.hidden
        self.conv1 = head.conv1
        layers = cast("list[Any]", head.layers)
        swins = [layer.swin_block[name] for layer in layers for name in ("block_1", "block_2")]
        self.swins = nn.ModuleList(_FoldedSwin(block, config, grid) for block in swins)
        self.classes = nn.ModuleList(_FoldedClasses(layer.attention, config) for layer in layers)
        self.decoders = nn.ModuleList(map(_FoldedUp, (head.decoder1, head.decoder2)))
        self.head = head.head
        orders = [window_order(grid, config.window, block.shift) for block in swins]
        plain = torch.arange(grid * grid)
        for index, (now, then) in enumerate(zip([plain, *orders], [*orders, plain], strict=True)):
            self.register_buffer(f"move_{index}", now.argsort()[then])

    def forward(
        self,
        patch_embeds: Tensor,
        spatial: Tensor,
        near_map: Tensor,
        far_map: Tensor,
        text_embeds: Tensor,
        class_halves: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """See the class."""
        correlation = text_embeds @ patch_embeds[0].T
        x = self.conv1(correlation.reshape(-1, 1, self.grid, self.grid)).flatten(2).transpose(1, 2)
        for index, swin in enumerate(self.swins):
            x = torch.index_select(x, 1, self.get_buffer(f"move_{index}"))
            x = swin(x, spatial[2 * index], spatial[2 * index + 1])
            if index % 2:
                place = (index // 2) * 2 * self.hidden
                x = self.classes[index // 2](
                    x, class_halves[:, None, place : place + 2 * self.hidden], padding
                )
        x = torch.index_select(x, 1, self.get_buffer("move_4"))
        maps = x.transpose(1, 2).reshape(-1, self.hidden, self.grid, self.grid)
        for decoder, added in zip(self.decoders, (near_map, far_map), strict=True):
            maps = decoder(maps, added)
        return cast(Tensor, self.head(maps).transpose(0, 1))


class _FoldedSwin(nn.Module):
    """A block whose tokens are in the order of its windows."""

    mask: Tensor | None

    def __init__(self, block: SwinBlock, config: AggregatorConfig, grid: int) -> None:
        super().__init__()
        self.num_heads, self.inside = config.num_heads, config.window**2
        scale = (config.hidden // config.num_heads) ** -0.5
        q, k = (cast(nn.Linear, block.attn[name]).weight[:, : config.hidden] for name in "qk")
        zeros = torch.zeros(config.hidden)
        self.q, self.k = linear_from(q * scale, zeros), linear_from(k.contiguous(), zeros)
        self.v, self.proj = block.attn["v"], block.attn["proj"]
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.fc1, self.fc2 = block.mlp["fc1"], block.mlp["fc2"]
        mask = None
        if block.shift:
            mask = shift_mask(grid, config.window, block.shift)
            mask = mask.repeat_interleave(config.num_heads, dim=0)[None]
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, for_queries: Tensor, for_keys: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = map(self._heads, (self.q(y) + for_queries, self.k(y) + for_keys, self.v(y)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=1.0)
        windows = x.shape[1] // self.inside
        mixed = mixed.reshape(-1, windows, self.num_heads, self.inside, v.shape[-1])
        x = x + self.proj(mixed.transpose(2, 3).reshape(-1, x.shape[1], x.shape[2]))
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _heads(self, x: Tensor) -> Tensor:
        """``[C, N, h]`` to ``[C, windows * heads, window^2, h / heads]``."""
        width, windows = x.shape[2] // self.num_heads, x.shape[1] // self.inside
        x = x.reshape(-1, windows, self.inside, self.num_heads, width)
        return x.transpose(2, 3).reshape(-1, windows * self.num_heads, self.inside, width)


class _FoldedClasses(nn.Module):
    """Attention between classes; the padding tokens' sums are constants."""

    pad_products: Tensor
    pad_totals: Tensor

    def __init__(self, attention: ClassAttention, config: AggregatorConfig) -> None:
        super().__init__()
        self.num_heads, hidden = config.num_heads, config.hidden
        q, k = (cast(nn.Linear, attention.attention[name]).weight[:, :hidden] for name in "qk")
        zeros = torch.zeros(hidden)
        self.q, self.k = linear_from(q.contiguous(), zeros), linear_from(k.contiguous(), zeros)
        self.v, self.MLP = attention.attention["v"], attention.MLP
        self.norm1, self.norm2 = attention.norm1, attention.norm2
        _, keys, values = attention.keys_values(
            attention.padding_tokens[0, 0], attention.padding_guidance[0, 0]
        )
        self.register_buffer("pad_products", keys[:, :, None] * values[:, None] * _VALUE_SCALE)
        self.register_buffer("pad_totals", keys[:, :, None].clone())

    def forward(self, x: Tensor, halves: Tensor, padding: Tensor) -> Tensor:
        y, width = self.norm1(x), x.shape[2]
        q = self._heads(F.elu(self.q(y) + halves[..., :width]) + 1.0).permute(1, 2, 0, 3)
        k = self._heads(F.elu(self.k(y) + halves[..., width:]) + 1.0)
        v = self._heads(self.v(y) * _VALUE_SCALE).permute(1, 2, 0, 3)
        products = k.permute(1, 2, 3, 0) @ v + padding * self.pad_products
        totals = k.sum(0)[..., None] + padding * self.pad_totals
        mixed = (q @ products) / _VALUE_SCALE / (q @ totals + 1e-6)
        refined = x + mixed.permute(2, 0, 1, 3).reshape(-1, x.shape[1], width)
        return cast(Tensor, x + refined + self.MLP(self.norm2(refined)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads)


class _FoldedUp(nn.Module):
    """A decoder stage: the upsampling and the class's part of the convolution behind it are one."""

    def __init__(self, decoder: UpBlock) -> None:
        super().__init__()
        kernel, lifted = _first_kernel(decoder)
        up = decoder.up.weight.detach()
        weight = torch.zeros(up.shape[0], kernel.shape[0], 4, 4)
        for row in range(3):
            for column in range(3):
                tap = torch.einsum("cuij,ou->coij", up, kernel[:, :lifted, row, column])
                weight[:, :, 2 - row : 4 - row, 2 - column : 4 - column] += tap
        self.up = nn.ConvTranspose2d(
            up.shape[0], kernel.shape[0], 4, stride=2, padding=1, bias=False
        )
        self.up.weight = nn.Parameter(weight, requires_grad=False)
        self.rest = cast(nn.Sequential, decoder.conv["double_conv"])[1:]

    def forward(self, maps: Tensor, added: Tensor) -> Tensor:
        return cast(Tensor, self.rest(self.up(maps) + added))
