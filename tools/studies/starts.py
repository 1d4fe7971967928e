"""Initial weights of decode heads that no paper has: aligned with CLIP, or with low logits.

Officially a decode head starts at random and has to learn from the annotated classes that CLIP's
patches match its texts. The aligned start gives it that match: the masks before the first step are
``14 cos(patch, name)`` plus an offset. Layout and graphs do not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.descriptor.model import (
    CellDecodeHead,
    DecodeHead,
    DecoderLayer,
    DecoderStack,
    MaskDecoder,
)

__all__ = ["COSINE_SCALE", "HeadStart", "scale_for"]

COSINE_SCALE = 14.0
"""Factor on the cosine of the aligned start: CLIP's own first logit scale, 1 / 0.07."""

_USUAL_SPREAD = 0.193  # of the cosines between the scenes' names in the shipped CLIP

_SPREAD = 10.0  # of the keys' constant part; the queries' is so small that patches hardly meet it


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """Initial weights for the head of a ZegCLIP or CLIP-RC that was just built.

    Attributes:
        aligned: Whether masks start as a multiple of the cosine of patch and name.
        offset: Added to all mask logits of the aligned start, such as -3 for masks that start
            empty.
        scale: Factor on the aligned start's cosine; None fits the names (:func:`scale_for`), or is
            14 without names.
        low_logits: Whether CLIP-RC's mask logits start as small as ZegCLIP's, for trainings at a
            high rate.
    """

    aligned: bool = False
    offset: float = 0.0
    scale: float | None = None
    low_logits: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.offset) or (self.offset and not self.aligned):
            raise ArgumentError(
                f"offset: expected a finite number, and 0 unless aligned, got {self.offset}."
            )
        if self.scale is not None and not (self.aligned and 0.0 < self.scale <= 1000.0):
            raise ArgumentError(
                f"scale: expected a number above 0 and at most 1000, and None unless aligned, got "
                f"{self.scale}."
            )
        if self.low_logits and self.aligned:
            raise ArgumentError("low_logits: expected False if aligned, which sets the logits.")

    def apply(self, head: DecodeHead | CellDecodeHead, class_embeds: Tensor | None = None) -> None:
        """Set the weights.

        Shapes:
            class_embeds: Names to fit the scale to, unit norm ``[C, D]``.

        Raises:
            ArgumentError: The head's width is not CLIP's, or it is not the head that this is for.
        """
        if self.low_logits:
            lower_initial_logits(head)
        if not self.aligned:
            return
        query_dim, embed_dim = _widths(head)
        if query_dim != embed_dim:
            raise ArgumentError(
                f"decoder.query_dim: expected CLIP's width {embed_dim} for the aligned start, got "
                f"{query_dim}. Leave it out."
            )
        scale = COSINE_SCALE if class_embeds is None else scale_for(class_embeds)
        factor = (self.scale or scale) / COSINE_SCALE
        if isinstance(head, DecodeHead):
            align_head(head.q_proj, head.decoder_1, self.offset)
            attention = head.decoder_1.decoder_layers()[-1].multihead_attn
            scaled = [attention.q.weight, attention.k.weight]
        else:
            stacks = head.decoder_q, head.decoder_v
            align_cell_head(head.q_proj, head.lateral_proj, stacks, self.offset)
            scaled = [stack.decoder_layers()[-1].norm3.weight for stack in stacks]
        with torch.no_grad():
            for weight in scaled:
                weight.mul_(math.sqrt(factor))


@torch.no_grad()
def lower_initial_logits(head: nn.Module) -> None:
    """Scale the last norms so that CLIP-RC's mask logits start with ZegCLIP's factor.

    Mask logits are plain products of two normalised vectors of width E, and start with a
    standard deviation near ``sqrt(E)``; those of ZegCLIP have a factor ``1 / sqrt(E * heads)``.
    With saturated masks and a high rate, a short training never recovers from its first steps
    (docs/benchmarks.md has figures). The product itself stays the official one, and training
    may grow the norms back.
    """
    if not isinstance(head, CellDecodeHead):
        raise ArgumentError("low_logits: expected CLIP-RC's head, got another. Leave it out.")
    for stack in (head.decoder_q, head.decoder_v):
        last = stack.decoder_layers()[-1]
        last.norm3.weight.mul_(math.sqrt(last.multihead_attn.logit_scale))


def _widths(head: DecodeHead | CellDecodeHead) -> tuple[int, int]:
    """The head's width, and CLIP's."""
    if isinstance(head, DecodeHead):
        keys = head.decoder_1.decoder_layers()[0].multihead_attn.k
        return keys.out_features, keys.in_features
    return head.q_proj.out_features, head.q_proj.in_features // 2


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
