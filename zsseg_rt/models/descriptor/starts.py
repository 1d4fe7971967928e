"""Initial weights of decode heads.

Officially a decode head starts at random and has to learn from the annotated classes that CLIP's
patches match its texts. The aligned start gives it that match: the masks before the first step are
``14 cos(patch, name)`` plus an offset. Layout and graphs do not change. Not official.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.descriptor.mask_decoder import DecoderLayer, DecoderStack, MaskDecoder

Start = Literal["random", "copies", "aligned"]

COSINE_SCALE = 14.0
"""Factor on the cosine of the aligned start: CLIP's own first logit scale, 1 / 0.07."""

_USUAL_SPREAD = 0.193  # of the cosines between the scenes' names in the shipped CLIP

_SPREAD = 10.0  # of the keys' constant part; the queries' is so small that patches hardly meet it


def check_start(start: str, offset: float, query_dim: int, embed_dim: int) -> None:
    """Refuse a start that is unknown or does not fit the head."""
    check_choice("start", start, get_args(Start))
    if offset and start != "aligned":
        raise ArgumentError(
            f"start_offset: expected 0 with start = {start!r}, got {offset}. Leave it out, or use "
            "start = 'aligned'."
        )
    if not math.isfinite(offset):
        raise ArgumentError(f"start_offset: expected a finite number, got {offset}. Change it.")
    if start == "aligned" and query_dim != embed_dim:
        raise ArgumentError(
            f"decoder.query_dim: expected CLIP's width {embed_dim} for start = 'aligned', got "
            f"{query_dim}. Leave it out."
        )


def scale_for(class_embeds: Tensor) -> float:
    """The factor that tells names apart as 14 does the shipped CLIP's, to two digits.

    It is inverse to the standard deviation of the cosines between names: 0.193 in the shipped CLIP,
    0.04 to 0.05 in OpenAI's, whose names differ less.

    Shapes:
        class_embeds: Unit norm ``[C, D]``; fewer than three names have no spread, and get 14.
    """
    rows, columns = torch.triu_indices(len(class_embeds), len(class_embeds), offset=1)
    cosines = (class_embeds @ class_embeds.T)[rows, columns]
    spread = float(cosines.std(unbiased=False)) if len(cosines) > 1 else 0.0
    return float(f"{COSINE_SCALE * _USUAL_SPREAD / spread:.2g}") if spread > 1e-3 else COSINE_SCALE


def check_scale(start: str, scale: float | None) -> float:
    """The factor of the aligned start; ArgumentError if it is none, or of another start."""
    if scale is not None and start != "aligned":
        raise ArgumentError(
            f"start_scale: expected None with start = {start!r}, got {scale}. Leave it out, or use "
            "start = 'aligned'."
        )
    if scale is not None and not 0.0 < scale <= 1000.0:
        raise ArgumentError(
            f"start_scale: expected a number above 0 and at most 1000, got {scale}. Change it."
        )
    return COSINE_SCALE if scale is None else scale


def copy_layers(stacks: Sequence[DecoderStack]) -> None:
    """Start every layer of each stack with the weights of its first."""
    for stack in stacks:
        stack.copy_first_layer()


@torch.no_grad()
def align_head(q_proj: nn.Linear, decoder: MaskDecoder, offset: float) -> None:
    """Align ZegCLIP's head: ``q_proj = [0 | sqrt(D) I]``, the last scores ``14 cos + offset``.

    All layers but the last pass queries on, each norm centring and scaling them, so that texts
    count without their mean over channels. The last layer's queries and keys are ``g I`` with
    ``g^2 = 14 sqrt(heads * E / D)``. The offset is a product of constant parts of queries and keys
    along the direction that centred queries do not have; where no layer's norm centres them, that
    is ``q_proj``'s to do.
    """
    _set_last_columns(q_proj)
    *refining, last = decoder.decoder_layers()
    for layer in refining:
        _pass_on(layer)
    attention = last.multihead_attn
    query_dim, embed_dim = attention.k.out_features, attention.k.in_features
    gain = math.sqrt(COSINE_SCALE * math.sqrt(attention.num_heads * query_dim / embed_dim))
    for linear in (attention.q, attention.k):
        linear.weight.copy_(gain * torch.eye(query_dim))
        linear.bias.zero_()
    if offset and not refining:
        q_proj.weight -= q_proj.weight.mean(dim=0)
    if offset:
        attention.k.bias.fill_(_SPREAD)
        attention.q.bias.fill_(offset / (attention.logit_scale * query_dim * _SPREAD))


@torch.no_grad()
def align_cell_head(
    q_proj: nn.Linear,
    lateral_proj: nn.Linear,
    stacks: tuple[DecoderStack, DecoderStack],
    offset: float,
) -> None:
    """Align CLIP-RC's head: queries are texts, patches CLIP's; their product ``14 cos + offset``.

    Both pass all layers unchanged, each norm centring and scaling them. The last norms' gains are
    ``sqrt(14 / D)``, and their shifts make the offset.
    """
    width = q_proj.out_features
    for linear in (q_proj, lateral_proj):
        _set_last_columns(linear)
    for stack in stacks:
        for layer in stack.decoder_layers():
            _pass_on(layer)
        last = stack.decoder_layers()[-1]
        last.norm3.weight.fill_(math.sqrt(COSINE_SCALE / width))
    if offset:
        queries, patches = (stack.decoder_layers()[-1].norm3.bias for stack in stacks)
        queries.fill_(math.copysign(math.sqrt(abs(offset) / width), offset))
        patches.fill_(math.sqrt(abs(offset) / width))


def _set_last_columns(linear: nn.Linear) -> None:
    """``[0 | sqrt(D) I]``, no bias: reads the last of the concatenated unit vectors alone."""
    width = linear.out_features
    linear.weight.zero_()
    linear.weight[:, -width:] = math.sqrt(width) * torch.eye(width)
    _zero(linear.bias)


def _pass_on(layer: DecoderLayer) -> None:
    """Let a layer add nothing."""
    for linear in (layer.multihead_attn.proj, layer.linear2):
        _zero(linear.weight)
        _zero(linear.bias)


def _zero(tensor: Tensor) -> None:
    tensor.zero_()
