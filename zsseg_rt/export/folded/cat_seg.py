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

from zsseg_rt.export.folded.cat_seg_head import (
    FoldedHead,
    HeadBegin,
    HeadEnd,
    HeadMiddle,
    first_kernel,
)
from zsseg_rt.export.folded.clip import FoldedBlock, linear_from
from zsseg_rt.models.cat_seg.aggregator import ClassAttention, SwinBlock, window_order
from zsseg_rt.models.cat_seg.model import CatSeg
from zsseg_rt.models.clip.image_encoder import unit
from zsseg_rt.models.clip.text_encoder import TextEncoder
from zsseg_rt.models.clip.transformer import ResidualBlock


@dataclass(frozen=True, kw_only=True)
class CatSegParts:
    """What a CAT-Seg is exported as.

    Attributes:
        image_encoder: From image to ``patch_embeds``, ``spatial``, ``near_map`` and ``far_map``.
        head: From these and the vocabulary to logits.
        stages: The head cut where classes meet, for vocabularies in several parts.
        weights: What the vocabulary's own terms are made with, by name.
        grid: Side of the patch grid.
    """

    image_encoder: FoldedViewEncoder
    head: FoldedHead
    stages: tuple[HeadBegin, HeadMiddle, HeadEnd]
    weights: Mapping[str, Tensor]
    grid: int


@torch.no_grad()
def fold_cat_seg(model: CatSeg) -> CatSegParts:
    """Split a model; the parts share unchanged weights with it."""
    encoder = FoldedViewEncoder(model).eval()
    head = FoldedHead(model, encoder.grid).eval()
    return CatSegParts(
        image_encoder=encoder,
        head=head,
        stages=(HeadBegin(head).eval(), HeadMiddle(head).eval(), HeadEnd(head).eval()),
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
            kernel, lifted = first_kernel(decoder)
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
