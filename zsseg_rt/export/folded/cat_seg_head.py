"""CAT-Seg's head with its folds, whole and cut into three where classes meet."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.export.folded.clip import linear_from
from zsseg_rt.models.cat_seg.aggregator import (
    AggregatorConfig,
    ClassAttention,
    SwinBlock,
    UpBlock,
    shift_mask,
    window_order,
)
from zsseg_rt.models.cat_seg.model import CatSeg

_VALUE_SCALE = 1 / 256  # keeps sums over classes within float16; a power of two


def first_kernel(decoder: UpBlock) -> tuple[Tensor, int]:
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
        x = self.begin(patch_embeds, text_embeds)
        for layer in range(len(self.classes)):
            x = self.refine(x, spatial, layer)
            products, totals = self.sums(x, class_halves, layer)
            x = self.meet(x, class_halves, layer, (products, totals, padding))
        return self.decode(x, near_map, far_map)

    def begin(self, patch_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Correlations as tokens ``[C, N, h]``, row by row."""
        correlation = text_embeds @ patch_embeds[0].T
        maps = self.conv1(correlation.reshape(-1, 1, self.grid, self.grid))
        return cast(Tensor, maps.flatten(2).transpose(1, 2))

    def refine(self, x: Tensor, spatial: Tensor, layer: int) -> Tensor:
        """Each class's tokens by themselves; they stay in the order of the layer's last windows."""
        for index in (2 * layer, 2 * layer + 1):
            x = torch.index_select(x, 1, self.get_buffer(f"move_{index}"))
            x = self.swins[index](x, spatial[2 * index], spatial[2 * index + 1])
        return x

    def sums(self, x: Tensor, class_halves: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What other classes see of these: ``[N, heads, d, d]`` and ``[N, heads, d, 1]``."""
        return cast(_FoldedClasses, self.classes[layer]).sums(x, self._halves(class_halves, layer))

    def meet(
        self, x: Tensor, class_halves: Tensor, layer: int, seen: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """``seen``: the sums over all classes, and the padding."""
        halves = self._halves(class_halves, layer)
        return cast(Tensor, self.classes[layer](x, halves, *seen))

    def decode(self, x: Tensor, near_map: Tensor, far_map: Tensor) -> Tensor:
        """From tokens to logits."""
        x = torch.index_select(x, 1, self.get_buffer("move_4"))
        maps = x.transpose(1, 2).reshape(-1, self.hidden, self.grid, self.grid)
        for decoder, added in zip(self.decoders, (near_map, far_map), strict=True):
            maps = decoder(maps, added)
        return cast(Tensor, self.head(maps).transpose(0, 1))

    def _halves(self, class_halves: Tensor, layer: int) -> Tensor:
        place = layer * 2 * self.hidden
        return class_halves[:, None, place : place + 2 * self.hidden]


class HeadBegin(nn.Module):
    """Up to where classes meet for the first time; sums go on from those of earlier parts."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        patch_embeds: Tensor,
        spatial: Tensor,
        text_embeds: Tensor,
        class_halves: Tensor,
        products: Tensor,
        totals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of these classes, and the sums with them."""
        x = self.head.refine(self.head.begin(patch_embeds, text_embeds), spatial, 0)
        own = self.head.sums(x, class_halves, 0)
        return x, products + own[0], totals + own[1]


class HeadMiddle(nn.Module):
    """From the first meeting to the second; see :class:`HeadBegin`."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        tokens: Tensor,
        first_products: Tensor,
        first_totals: Tensor,
        spatial: Tensor,
        class_halves: Tensor,
        padding: Tensor,
        products: Tensor,
        totals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``first_*``: the first meeting's sums over all classes."""
        seen = (first_products, first_totals, padding)
        x = self.head.refine(self.head.meet(tokens, class_halves, 0, seen), spatial, 1)
        own = self.head.sums(x, class_halves, 1)
        return x, products + own[0], totals + own[1]


class HeadEnd(nn.Module):
    """From the second meeting to logits."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        tokens: Tensor,
        products: Tensor,
        totals: Tensor,
        near_map: Tensor,
        far_map: Tensor,
        class_halves: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """``products`` and ``totals``: the second meeting's, over all classes."""
        x = self.head.meet(tokens, class_halves, 1, (products, totals, padding))
        return self.head.decode(x, near_map, far_map)


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

    def sums(self, x: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
        """Over these classes: keys times values, and keys."""
        y, width = self.norm1(x), x.shape[2]
        k = self._heads(F.elu(self.k(y) + halves[..., width:]) + 1.0)
        v = self._heads(self.v(y) * _VALUE_SCALE).permute(1, 2, 0, 3)
        return k.permute(1, 2, 3, 0) @ v, k.sum(0)[..., None]

    def forward(
        self, x: Tensor, halves: Tensor, products: Tensor, totals: Tensor, padding: Tensor
    ) -> Tensor:
        """``products`` and ``totals`` are sums over all classes."""
        y, width = self.norm1(x), x.shape[2]
        q = self._heads(F.elu(self.q(y) + halves[..., :width]) + 1.0).permute(1, 2, 0, 3)
        products = products + padding * self.pad_products
        totals = totals + padding * self.pad_totals
        mixed = (q @ products) / _VALUE_SCALE / (q @ totals + 1e-6)
        refined = x + mixed.permute(2, 0, 1, 3).reshape(-1, x.shape[1], width)
        return cast(Tensor, x + refined + self.MLP(self.norm2(refined)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads)


class _FoldedUp(nn.Module):
    """A decoder stage: the upsampling and the class's part of the convolution behind it are one."""

    def __init__(self, decoder: UpBlock) -> None:
        super().__init__()
        weight = decoder.raising_kernel().detach()
        inputs, outputs = weight.shape[:2]
        self.up = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        self.up.weight = nn.Parameter(weight, requires_grad=False)
        layers = cast(nn.Sequential, decoder.conv["double_conv"])[1:]
        self.rest = nn.Sequential(
            *(
                FoldedGroupNorm(layer) if isinstance(layer, nn.GroupNorm) else layer
                for layer in layers
            )
        )

    def forward(self, maps: Tensor, added: Tensor) -> Tensor:
        return cast(Tensor, self.rest(self.up(maps) + added))


class FoldedGroupNorm(nn.Module):
    """Group normalisation that reshapes per-channel figures alone, not the maps.

    ONNX has it as an instance norm between two reshapes, before which OpenVINO brings the maps of
    its convolutions into another order: a fifth of the head's time. Figures are L2 norms, which
    stay small and in float32 where the rest is float16.
    """

    weight: Tensor
    bias: Tensor
    least: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups
        least = (norm.num_channels / norm.num_groups * norm.eps) ** 0.5
        self.register_buffer("least", torch.full((1, 1, 1), least))
        for name in ("weight", "bias"):
            self.register_buffer(name, norm.get_parameter(name).detach().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[C, channels, h, w]`` to the same."""
        mean = self._grouped(x.mean((2, 3)))
        x = x - self._spread(mean.mean(2, keepdim=True))
        size = torch.linalg.vector_norm(x, dim=(2, 3)) / (x.shape[2] * x.shape[3]) ** 0.5
        size = self._grouped(size)
        inside = size.shape[2]
        size = torch.cat([size, self.least.expand(size.shape[0], self.groups, 1)], dim=2)
        size = torch.linalg.vector_norm(size, dim=2, keepdim=True) / inside**0.5
        return x * (self.weight / self._spread(size)) + self.bias

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.groups, x.shape[1] // self.groups)

    def _spread(self, x: Tensor) -> Tensor:
        """A figure per group to all its channels."""
        inside = self.weight.shape[1] // self.groups
        return x.expand(-1, -1, inside).reshape(-1, self.groups * inside, 1, 1)
