"""From what a pipeline gives to a label for every pixel, one kernel call for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Array
from zsseg_rt.bundle import HeadSpec
from zsseg_rt.pipelines.base import BoundClasses, RegionVotes, SegmentMasks
from zsseg_rt.workspace import StageClock, Workspace

__all__ = ["LabelRule", "label_pixels"]

Labels = tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How scores become labels.

    Attributes:
        head: The bundle's rule.
        unknown_below: Score under which a pixel is unknown; None takes the bundle's.
        with_scores: Whether scores are wanted.
    """

    head: HeadSpec
    unknown_below: float | None
    with_scores: bool

    @property
    def threshold(self) -> float | None:
        """The threshold in force, or None for none."""
        return self.head.unknown_below if self.unknown_below is None else self.unknown_below


def label_pixels(
    masks: Array | SegmentMasks | RegionVotes,
    out_hw: Size,
    classes: BoundClasses,
    rule: LabelRule,
    space: Workspace,
    clock: StageClock,
) -> Labels:
    """Label every pixel with a phrase.

    Args:
        masks: What the pipeline gave.
        out_hw: Height and width of the result.
        classes: The classes in force.
        rule: How scores become labels.
        space: Where buffers and the stream are.
        clock: Marked at the end of the stage ``upsample_argmax``.

    Returns:
        Phrase labels [H, W] and their scores float32 [H, W] or None, in host memory.
    """
    if isinstance(masks, SegmentMasks):
        return _label_segments(masks, out_hw, classes, rule, space, clock)
    if isinstance(masks, RegionVotes):
        labels, scores = ops.label_regions(
            masks.mask_logits,
            masks.class_scores,
            canvas_hw=masks.canvas_hw,
            out_hw=out_hw,
            bias=classes.bias,
            unknown_below=rule.threshold,
            with_scores=rule.with_scores,
            stream=space.stream,
        )
        clock.mark("upsample_argmax")
        return space.fetch(labels), None if scores is None else space.fetch(scores)
    labels, scores = ops.upsample_argmax(
        masks,
        out_hw,
        activation=rule.head.activation,
        seen=classes.seen,
        seen_bias=rule.head.seen_bias if classes.seen is not None else 0.0,
        unknown_below=rule.threshold,
        with_scores=rule.with_scores,
        stream=space.stream,
    )
    clock.mark("upsample_argmax")
    return space.fetch(labels)[0], None if scores is None else space.fetch(scores)[0]


def _label_segments(
    masks: SegmentMasks,
    out_hw: Size,
    classes: BoundClasses,
    rule: LabelRule,
    space: Workspace,
    clock: StageClock,
) -> Labels:
    segments, _ = ops.upsample_argmax(masks.masks, out_hw, stream=space.stream)
    clock.mark("upsample_argmax")
    host = space.fetch(segments)[0]
    labels, scores = masks.tables(len(classes.vocabulary.phrases), rule.threshold)
    return labels[host], scores[host] if rule.with_scores else None
