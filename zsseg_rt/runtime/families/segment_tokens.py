"""ZeroSeg: an image is a few segments; each segment takes the class nearest to it.

Source: Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
Distillation Only" (ZeroSeg), ICCV 2023, which labels segments as Xu et al., "GroupViT", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec, SegmentSpec
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BackendError
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    Family,
    FrameState,
    GoldenRule,
    Pipeline,
    SegmentMasks,
)
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import Vocabulary

_Rows = npt.NDArray[np.float32]
_Judged = tuple[npt.NDArray[np.int64], _Rows]  # the best phrase of each segment, its score


class SegmentTokensPipeline(Pipeline):
    """Finds segments and their classes."""

    def __init__(
        self, family: SegmentTokensFamily, sessions: Mapping[str, Session], workspace: Workspace
    ) -> None:
        super().__init__(family, sessions, workspace)
        self._segments = family.segments

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Keep the text embeddings on the host: a handful of rows is compared with them there."""
        return classes

    def masks(self, state: FrameState) -> SegmentMasks:
        """Run the encoder; on a GPU, segments are compared with phrases when its work is over."""
        workspace, encoded = self._workspace, self._encode(state.image)
        segment_embeds, image_embed = (
            workspace.read_back(name, encoded[name]) for name in ("segment_embeds", "image_embed")
        )
        judge: Callable[[BoundClasses], _Judged]
        judge = partial(self._judge, segment_embeds, image_embed)
        if workspace.device == "cpu":
            judged = judge(state.classes)
            judge = partial(lambda _: judged)
        self._clock.mark("similarity")
        group_map = encoded["group_map"]
        if state.trace is not None:
            state.trace.update(encoded, mask_logits=group_map)
        return SegmentMasks(mask_logits=group_map, judge=judge)

    def _judge(self, segment_embeds: _Rows, image_embed: _Rows, classes: BoundClasses) -> _Judged:
        if not (np.isfinite(segment_embeds).all() and np.isfinite(image_embed).all()):
            raise BackendError(
                "segment_embeds: expected finite numbers, got NaN or infinity at precision "
                f"{self._image_encoder.precision}. Use precision='float32' and run self_check()."
            )
        scores = segment_scores(
            segment_embeds[0],
            image_embed[0],
            np.asarray(classes.text_embeds),
            self._head,
            self._segments,
        )
        return scores.argmax(axis=1), scores.max(axis=1)


class SegmentTokensFamily(Family):
    """Bundles of family ``segment_tokens``.

    ``precision="auto"`` is float32: with hard groups, rounding changes labels.
    """

    name, pipeline = "segment_tokens", SegmentTokensPipeline
    auto_precisions = ("float32",)
    golden = GoldenRule(
        stages=("image", "segment_embeds", "image_embed", "mask_logits"), raw_logits=False
    )

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        assert bundle.segments is not None, "the family's bundles have them"
        super().__init__(bundle, config)
        self.segments = bundle.segments  # they get classes on the host, after the last kernel

    def rows_for(self, num_phrases: int) -> int:
        """No further rows: on the GPU, nothing depends on the phrases."""
        return num_phrases

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        bound = super().bind(vocabulary, device=device)
        return replace(bound, text_embeds=_unit_rows(vocabulary.embeds))


def segment_scores(
    segment_embeds: _Rows,
    image_embed: _Rows,
    text_embeds: _Rows,
    head: HeadSpec,
    segments: SegmentSpec,
) -> _Rows:
    """Score every phrase for every segment, by GroupViT's rule: [G, P] in [0, 1].

    Of segments [G, D], an image [D] and unit rows of texts [P, D]. With p the softmax over phrases
    of ``logit_scale * cosine`` and q the same softmax over the ``top_k`` phrases nearest to the
    whole image, scores are ``p * q``; with ``plain_cosine`` they are ``p``.
    """
    logits = np.float32(head.logit_scale) * (_unit_rows(segment_embeds) @ text_embeds.T)
    scores = _softmax(logits)
    if segments.plain_cosine:
        return scores
    if segments.top_k is not None and segments.top_k < len(text_embeds):
        overall = text_embeds @ image_embed
        nearest = np.argsort(-overall, kind="stable")[: segments.top_k]
        masked = np.full_like(logits, -np.inf)
        masked[:, nearest] = logits[:, nearest]
        logits = masked
    product: _Rows = _softmax(logits) * scores
    return product


def _unit_rows(rows: _Rows) -> _Rows:
    """Rows divided by their L2 norm; a row of zeros stays zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), np.float32)


def _softmax(logits: _Rows) -> _Rows:
    terms = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    return np.asarray(terms / np.sum(terms, axis=1, keepdims=True), np.float32)
