"""CLIP-RC: ZegCLIP with cell tokens, queries of each cell, and a decoder that works both ways.

A cell, which the paper calls a region, is one square of a regular grid over the image.

Module and parameter names are the official checkpoints', so ``state_dict()`` and official files
share one layout. Decoder tensors that no forward pass reads (``self_attn.*``, ``norm1.*``) do not
exist here; checkpoints of the Jittor port lack them too.

Source:
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ShapeError
from zsseg_rt.models.base import SegmentationOutput
from zsseg_rt.models.clip.towers import (
    ImageEncoderConfig,
    PromptedImageEncoder,
    unit,
    with_cells,
)
from zsseg_rt.models.descriptor.model import (
    DecoderConfig,
    DecoderLayer,
    DecoderStack,
    DescriptorConfig,
    DescriptorModel,
    without_retired,
)
from zsseg_rt.models.functional import check_text_embeds, describe, patch_text_similarity
from zsseg_rt.networks.descriptor import cells_of_patches


class CellEmbeds(NamedTuple):
    """What the cell image tower returns."""

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
        """What earlier versions wrote, in today's words."""
        return with_cells(without_retired(raw))


@dataclass(frozen=True)
class Recovery:
    """What the recovery decoder makes of the decoded tokens, and its targets.

    The recovery loss is ``|queries - query_targets|.mean() + |patches - patch_targets|.mean()``
    times its weight. No gradient flows into the targets.
    """

    queries: Tensor  # [B, R * C, 2D], cell-major
    patches: Tensor  # [B, N, D]
    query_targets: Tensor  # The queries before their projection, [B, R * C, 2D]
    patch_targets: Tensor  # The patch embeddings, [B, N, D]


@dataclass(frozen=True)
class CellOutput(SegmentationOutput):
    """What a forward pass of CLIP-RC returns."""

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
        picture = embeds.cls_embed[:, None].expand(-1, cells.shape[1], -1)
        joined = torch.cat([cells, picture, embeds.patch_embeds], dim=-1)
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
