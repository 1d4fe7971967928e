"""From ZeroSeg's segments to classes: GroupViT's rule.

Source:
    Xu et al., "GroupViT", CVPR 2022: its segmentation inference, which ZeroSeg follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.errors import ArgumentError, ShapeError


@dataclass(frozen=True, kw_only=True)
class ClassRule:
    """How segments are compared with classes.

    Attributes:
        logit_scale: Multiplies cosines before the softmax.
        top_k: Number of classes kept: those nearest to the whole image. None keeps all.
        plain_cosine: Whether scores are the bare softmax over all classes.
    """

    logit_scale: float = 100.0
    top_k: int | None = 5
    plain_cosine: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.logit_scale < float("inf"):
            raise ArgumentError(
                f"logit_scale: expected a number above 0, got {self.logit_scale}. "
                "GroupViT and CLIP use 100."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ArgumentError(
                f"top_k: expected at least 1, got {self.top_k}. Use None to keep all classes."
            )


def class_scores(
    segment_embeds: Tensor, image_embed: Tensor, text_embeds: Tensor, rule: ClassRule
) -> Tensor:
    """Score every class for every segment.

    With p the softmax over classes of ``logit_scale * cosine`` and q the same softmax over only the
    ``top_k`` classes nearest to the whole image, scores are ``p * q``; ``p`` with
    ``plain_cosine``.

    Shapes:
        segment_embeds: ``[B, G, D]``.
        image_embed: ``[B, D]``.
        text_embeds: ``[C, D]``.

    Returns:
        ``[B, G, C]`` in [0, 1].
    """
    width = segment_embeds.shape[-1]
    if text_embeds.ndim != 2 or text_embeds.shape[1] != width or not len(text_embeds):
        raise ShapeError(
            f"text_embeds: expected [C, {width}] with at least one class, got "
            f"{list(text_embeds.shape)}. Use embeddings of the teacher's text encoder."
        )
    text = F.normalize(text_embeds.to(segment_embeds), dim=-1)
    logits = rule.logit_scale * (F.normalize(segment_embeds, dim=-1) @ text.T)
    scores = logits.softmax(dim=-1)
    if rule.plain_cosine:
        return scores
    if rule.top_k is not None and rule.top_k < len(text):
        overall = F.normalize(image_embed, dim=-1) @ text.T
        order = overall.argsort(dim=-1, descending=True, stable=True)
        dropped = torch.ones_like(overall, dtype=torch.bool)
        dropped.scatter_(1, order[:, : rule.top_k], False)
        logits = logits.masked_fill(dropped[:, None], float("-inf"))
    return logits.softmax(dim=-1) * scores


def pixel_segments(group_map: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """The segment of every pixel: shares ``[B, G, gh, gw]`` are upsampled; the largest wins.

    Returns:
        int64 ``[B, *out_hw]``.
    """
    upsampled = F.interpolate(group_map, size=out_hw, mode="bilinear", align_corners=False)
    return upsampled.argmax(dim=1)


def spread_scores(
    scores: Tensor, segments: Tensor, background_threshold: float | None = None
) -> Tensor:
    """Give every pixel the class scores of its segment.

    With a background, a segment whose best class is below
    ``min(background_threshold, best score of all segments)`` is background: channel 0 is 1 there.
    So the best segment is never background.

    Shapes:
        scores: ``[B, G, C]``.
        segments: Segment of every pixel, int64 ``[B, H, W]``.
        background_threshold: A score in [0, 1]; None for no background channel.

    Returns:
        ``[B, C, H, W]``, or ``[B, 1 + C, H, W]`` with the background first.
    """
    if background_threshold is not None:
        best = scores.amax(dim=2, keepdim=True)
        limit = best.amax(dim=1, keepdim=True).clamp(max=background_threshold)
        scores = torch.cat([(best < limit).to(scores), scores], dim=2)
    index = segments.flatten(1)[..., None].expand(-1, -1, scores.shape[2])
    spread = scores.gather(1, index).transpose(1, 2)
    return torch.unflatten(spread, 2, segments.shape[1:])


def check_threshold(background_threshold: float | None) -> None:
    """Refuse thresholds that are not scores."""
    if background_threshold is not None and not 0 <= background_threshold <= 1:
        raise ArgumentError(
            f"background_threshold: expected a score in [0, 1], got {background_threshold}. "
            "Use None for no background."
        )
