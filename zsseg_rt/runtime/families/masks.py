"""The three kinds of masks that pipelines return; each labels pixels with one kernel call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.common.arrays import Array, label_dtype, reshaped
from zsseg_rt.errors import ArgumentError
from zsseg_rt.ops import core
from zsseg_rt.runtime.families.base import BoundClasses, LabelRule, Labels, PixelLabels
from zsseg_rt.runtime.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class ClassLogits:
    """A logit for every phrase at every point of a grid."""

    mask_logits: Array  # float32 [1, P, gh, gw] on the device; [B, P, gh, gw] of several windows

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Upsample, activate and take the best phrase, or its class by the table."""
        shape, table = self.mask_logits.shape, classes.label_table
        dtype = label_dtype(shape[1]) if table is None else table.dtype
        painting = rule.painting if table is not None else None  # colours are those of classes
        label: Callable[..., tuple[Any, ...]] = partial(ops.upsample_argmax, out_hw=out_hw)
        if painting is not None:
            label = partial(
                ops.upsample_argmax_overlay,
                frame=painting.frame,
                palette=painting.palette,
                alpha=painting.alpha,
                picture=painting.image,
            )
        labels, scores, *_ = label(
            self.mask_logits,
            activation=rule.head.activation,
            seen=classes.seen,
            seen_bias=rule.head.seen_bias if classes.seen is not None else 0.0,
            unknown_below=rule.threshold,
            with_scores=rule.with_scores,
            label_table=table,
            num_classes=classes.num_phrases,
            align=rule.head.align,
            out=_label_memory((1, *out_hw), dtype, rule.with_scores, workspace),
            stream=workspace.stream,
        )
        return PixelLabels(
            labels=reshaped(labels, out_hw),
            scores=None if scores is None else reshaped(scores, out_hw),
            of_classes=table is not None,
            painted=painting is not None,
        )

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """The activated logits."""
        logits = np.array(workspace.fetch(self.mask_logits)[0, :num_phrases], np.float32)
        if rule.head.activation == "sigmoid":
            return _sigmoid(logits)
        if rule.head.activation == "softmax":
            shares = np.exp(logits - logits.max(axis=0))
            logits = shares / shares.sum(axis=0)
        return logits


@dataclass(frozen=True, kw_only=True)
class RegionVotes:
    """Soft masks that vote for classes."""

    mask_logits: Array  # float32 [Q, h, w] on the device
    class_scores: Array  # float32 [P, Q] on the device
    canvas_hw: tuple[int, int]  # Height and width at which masks become soft

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Sum the votes of all masks and take the best phrase."""
        dtype, scratch = label_dtype(self.class_scores.shape[0]), None
        if workspace.device != "cpu":
            size = core.label_regions_device_bytes(*self.class_scores.shape)
            scratch = workspace.array("label_regions", (size,), np.uint8)
        labels, scores = ops.label_regions(
            self.mask_logits,
            self.class_scores,
            canvas_hw=self.canvas_hw,
            out_hw=out_hw,
            bias=classes.bias,
            unknown_below=rule.threshold,
            with_scores=rule.with_scores,
            out=_label_memory(out_hw, dtype, rule.with_scores, workspace),
            workspace=scratch,
            stream=workspace.stream,
        )
        return PixelLabels(labels=labels, scores=scores)

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """The sums of votes."""
        votes = np.asarray(workspace.fetch(self.class_scores))[:num_phrases]
        soft = _sigmoid(np.asarray(workspace.fetch(self.mask_logits)))
        scores: npt.NDArray[np.float32] = np.einsum("pq,qhw->phw", votes, soft, optimize=True)
        return scores


@dataclass(frozen=True, kw_only=True)
class SegmentMasks:
    """An image cut into segments, each with one phrase."""

    # float32 [1, G, gh, gw] on the device: a pixel belongs to the segment whose upsampled value is
    # largest
    mask_logits: Array
    # Returns the best phrase of each segment, int64 [G], and its score in [0, 1], float32 [G],
    # given the classes; called once the GPU's work has been waited for
    judge: Callable[[BoundClasses], tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Find each pixel's segment; what it is called is looked up later, on the host."""
        dtype = label_dtype(self.mask_logits.shape[1])
        out = _label_memory((1, *out_hw), dtype, False, workspace)
        segments, _ = ops.upsample_argmax(
            self.mask_logits, out_hw, out=out, stream=workspace.stream
        )

        def look_up(host: npt.NDArray[Any], named: BoundClasses) -> Labels:
            phrases, values = self.judge(named)
            labels, scores = _tables(phrases, values, len(named.vocabulary.phrases), rule.threshold)
            return labels[host], scores[host] if rule.with_scores else None

        return PixelLabels(labels=reshaped(segments, out_hw), look_up=look_up)

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """Refused: segments have one phrase each."""
        raise ArgumentError(
            "with_class_scores: expected None for a bundle of family segment_tokens, whose "
            "segments have one class each, got 'low'."
        )


def _tables(
    phrases: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    num_phrases: int,
    unknown_below: float | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """The phrase labels [256] and scores float32 [256] of segments; unknown and 0 beyond them."""
    dtype = label_dtype(num_phrases)
    unknown, count = np.iinfo(dtype).max, len(phrases)
    labels, scores = np.full(256, unknown, dtype), np.zeros(256, np.float32)
    labels[:count], scores[:count] = phrases, values
    if unknown_below is not None:
        # the best one never is unknown
        limit = min(np.float32(unknown_below), np.max(values))
        labels[:count][values < limit] = unknown
    return labels, scores


def _label_memory(
    shape: tuple[int, ...], dtype: np.dtype[Any], with_scores: bool, workspace: Workspace
) -> tuple[Array, Array | None] | None:
    """The lane's memory for labels and scores; None, so new arrays, on the CPU."""
    if workspace.device == "cpu":
        return None
    scores = workspace.array("scores", shape, np.float32) if with_scores else None
    return workspace.array(f"labels {dtype}", shape, dtype), scores


def _sigmoid(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shares: npt.NDArray[np.float32] = 0.5 * (np.tanh(0.5 * values) + 1.0)  # never overflows
    return shares
