"""The three kinds of masks that pipelines return; each labels pixels with one kernel call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.arrays import Array
from zsseg_rt.clock import StageClock
from zsseg_rt.errors import ArgumentError
from zsseg_rt.families.base import BoundClasses, LabelRule, Labels
from zsseg_rt.workspace import Workspace

__all__ = ["ClassLogits", "RegionVotes", "SegmentMasks"]


@dataclass(frozen=True, kw_only=True)
class ClassLogits:
    """A logit for every phrase at every point of a grid.

    Attributes:
        mask_logits: float32 [1, P, gh, gw] on the device.
    """

    mask_logits: Array

    def label(
        self,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        workspace: Workspace,
        clock: StageClock,
    ) -> Labels:
        """See :class:`zsseg_rt.families.base.Masks`."""
        out = _label_memory(self.mask_logits.shape, out_hw, rule.with_scores, workspace)
        labels, scores = ops.upsample_argmax(
            self.mask_logits,
            out_hw,
            activation=rule.head.activation,
            seen=classes.seen,
            seen_bias=rule.head.seen_bias if classes.seen is not None else 0.0,
            unknown_below=rule.threshold,
            with_scores=rule.with_scores,
            out=out,
            stream=workspace.stream,
        )
        clock.mark("upsample_argmax")
        return workspace.fetch(labels)[0], None if scores is None else workspace.fetch(scores)[0]

    def grid_scores(self, rule: LabelRule, workspace: Workspace) -> npt.NDArray[np.float32]:
        """See :class:`zsseg_rt.families.base.Masks`."""
        logits = np.array(workspace.fetch(self.mask_logits)[0], np.float32)
        if rule.head.activation == "sigmoid":
            return _sigmoid(logits)
        if rule.head.activation == "softmax":
            shares = np.exp(logits - logits.max(axis=0))
            logits = shares / shares.sum(axis=0)
        return logits


@dataclass(frozen=True, kw_only=True)
class RegionVotes:
    """Soft masks that vote for classes.

    Attributes:
        mask_logits: float32 [Q, h, w] on the device.
        class_scores: float32 [P, Q] on the device.
        canvas_hw: Height and width at which masks become soft.
    """

    mask_logits: Array
    class_scores: Array
    canvas_hw: tuple[int, int]

    def label(
        self,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        workspace: Workspace,
        clock: StageClock,
    ) -> Labels:
        """See :class:`zsseg_rt.families.base.Masks`."""
        out, scratch = _vote_memory(self.class_scores.shape, out_hw, rule.with_scores, workspace)
        labels, scores = ops.label_regions(
            self.mask_logits,
            self.class_scores,
            canvas_hw=self.canvas_hw,
            out_hw=out_hw,
            bias=classes.bias,
            unknown_below=rule.threshold,
            with_scores=rule.with_scores,
            out=out,
            workspace=scratch,
            stream=workspace.stream,
        )
        clock.mark("upsample_argmax")
        return workspace.fetch(labels), None if scores is None else workspace.fetch(scores)

    def grid_scores(self, rule: LabelRule, workspace: Workspace) -> npt.NDArray[np.float32]:
        """See :class:`zsseg_rt.families.base.Masks`."""
        votes = np.asarray(workspace.fetch(self.class_scores))
        soft = _sigmoid(np.asarray(workspace.fetch(self.mask_logits)))
        scores: npt.NDArray[np.float32] = np.einsum("pq,qhw->phw", votes, soft, optimize=True)
        return scores


@dataclass(frozen=True, kw_only=True)
class SegmentMasks:
    """An image cut into segments, each with one phrase.

    Attributes:
        mask_logits: float32 [1, G, gh, gw] on the device: a pixel belongs to the segment whose
            upsampled value is largest.
        phrases: int64 [G]: the best phrase of each segment.
        scores: float32 [G]: its score, in [0, 1].
    """

    mask_logits: Array
    phrases: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def label(
        self,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        workspace: Workspace,
        clock: StageClock,
    ) -> Labels:
        """See :class:`zsseg_rt.families.base.Masks`."""
        out = _label_memory(self.mask_logits.shape, out_hw, False, workspace)
        segments, _ = ops.upsample_argmax(
            self.mask_logits, out_hw, out=out, stream=workspace.stream
        )
        clock.mark("upsample_argmax")
        host = workspace.fetch(segments)[0]
        labels, scores = self._tables(len(classes.vocabulary.phrases), rule.threshold)
        return labels[host], scores[host] if rule.with_scores else None

    def grid_scores(self, rule: LabelRule, workspace: Workspace) -> npt.NDArray[np.float32]:
        """See :class:`zsseg_rt.families.base.Masks`: segments have one phrase each."""
        raise ArgumentError(
            "with_class_scores: expected None for a bundle of family segment_tokens, whose "
            "segments have one class each, got 'low'."
        )

    def _tables(
        self, num_phrases: int, unknown_below: float | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """What segment indices stand for: phrase labels [256] and scores float32 [256].

        A segment whose score is below ``min(unknown_below, best score)`` is unknown, so the best
        one never is; the entries beyond the segments are unknown with score 0.
        """
        dtype = np.uint8 if num_phrases <= 254 else np.uint16
        unknown, count = np.iinfo(dtype).max, len(self.phrases)
        labels, scores = np.full(256, unknown, dtype), np.zeros(256, np.float32)
        labels[:count], scores[:count] = self.phrases, self.scores
        if unknown_below is not None:
            limit = min(np.float32(unknown_below), np.max(self.scores))
            labels[:count][self.scores < limit] = unknown
        return labels, scores


def _label_memory(
    logits_shape: tuple[int, ...], out_hw: tuple[int, int], with_scores: bool, workspace: Workspace
) -> tuple[Array, Array | None] | None:
    """On a GPU, the lane's memory for labels and scores."""
    dtype = np.uint8 if logits_shape[1] <= 254 else np.uint16
    labels = workspace.result(f"labels {np.dtype(dtype)}", (1, *out_hw), dtype)
    scores = workspace.result("scores", (1, *out_hw), np.float32) if with_scores else None
    return None if labels is None else (labels, scores)


def _vote_memory(
    scores_shape: tuple[int, ...], out_hw: tuple[int, int], with_scores: bool, workspace: Workspace
) -> tuple[Any, Array | None]:
    """The same for masks that vote, of class scores [P, Q]."""
    dtype = np.dtype(np.uint8 if scores_shape[0] <= 254 else np.uint16)
    labels = workspace.result(f"region labels {dtype}", out_hw, dtype)
    scores = workspace.result("region scores", out_hw, np.float32) if with_scores else None
    size = _C.label_regions_device_bytes(scores_shape[0], scores_shape[1])
    out = None if labels is None else (labels, scores)
    return out, workspace.scratch("label_regions", size)


def _sigmoid(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shares: npt.NDArray[np.float32] = 0.5 * (np.tanh(0.5 * values) + 1.0)  # never overflows
    return shares
