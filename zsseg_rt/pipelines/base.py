"""The contract of a pipeline, and what all of them need to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle, HeadSpec
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace

__all__ = [
    "BoundClasses",
    "GraphLoader",
    "Pipeline",
    "RegionVotes",
    "SegmentMasks",
    "Trace",
    "seen_phrases",
]

GraphLoader = Callable[[str], Session]
"""Loads the bundle's graph of that name on the engine's backend, device and precision."""

Trace = dict[str, Array]
"""Receives every intermediate array by its name in the golden sample."""


@dataclass(frozen=True, kw_only=True)
class BoundClasses:
    """A vocabulary with its arrays on the pipeline's device.

    Attributes:
        vocabulary: The classes.
        seen: bool [P], phrases that training saw; None if the bundle names no seen class.
        text_embeds: float32 [P, D] on the device.
        text_queries: float32 [P, E] on the device: the image-independent half of the class
            queries; None in families without it.
        bias: float32 [P] on the device, taken off each phrase's score; None in families whose
            kernel takes ``seen`` instead.
    """

    vocabulary: Vocabulary
    seen: npt.NDArray[np.bool_] | None
    text_embeds: Array
    text_queries: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True, kw_only=True)
class RegionVotes:
    """Soft masks that vote for classes, for :func:`zsseg_rt.ops.label_regions`.

    Attributes:
        mask_logits: float32 [Q, h, w] on the device.
        class_scores: float32 [P, Q] on the device.
        canvas_hw: Height and width at which masks become soft.
    """

    mask_logits: Array
    class_scores: Array
    canvas_hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SegmentMasks:
    """A picture cut into segments of which each has one phrase.

    Attributes:
        masks: float32 [1, G, gh, gw] on the device: a pixel belongs to the segment whose
            upsampled value is largest. Valid until the next call.
        phrases: int64 [G]: the best phrase of each segment.
        scores: float32 [G]: its score, in [0, 1].
    """

    masks: Array
    phrases: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def tables(
        self, num_phrases: int, unknown_below: float | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """What segment indices stand for.

        A segment whose score is below ``min(unknown_below, best score)`` is unknown, so the best
        one never is.

        Args:
            num_phrases: Phrases of the vocabulary.
            unknown_below: None keeps every segment.

        Returns:
            Phrase labels [256], uint8 or above 254 phrases uint16, and scores float32 [256]; the
            entries beyond the segments are unknown with score 0.
        """
        dtype = np.uint8 if num_phrases <= 254 else np.uint16
        unknown, count = np.iinfo(dtype).max, len(self.phrases)
        labels, scores = np.full(256, unknown, dtype), np.zeros(256, np.float32)
        labels[:count], scores[:count] = self.phrases, self.scores
        if unknown_below is not None:
            limit = min(np.float32(unknown_below), np.max(self.scores))
            labels[:count][self.scores < limit] = unknown
        return labels, scores


def seen_phrases(vocabulary: Vocabulary, head: HeadSpec) -> npt.NDArray[np.bool_] | None:
    """Which phrases name a class that training saw; None if the bundle names none."""
    return np.isin(vocabulary.phrases, head.seen) if head.seen else None


class Pipeline(Protocol):
    """From image to low-resolution class logits, or to masks that vote for classes."""

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Precompute what depends on the classes alone."""

    def mask_logits(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> Array | SegmentMasks | RegionVotes:
        """Compute class logits, segments that already have their class, or masks that vote.

        Args:
            image: float32 [1, 3, h, w], preprocessed, on the device.
            classes: What :meth:`bind` gave.
            clock: Marked at the end of every stage.
            trace: Receives every intermediate, for self-checks.

        Returns:
            float32 [1, P, gh, gw] on the device, valid until the next call; or the segments,
            or the masks with their votes.
        """


class PipelineFactory(Protocol):
    """How a family's pipeline is made."""

    def __call__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> Pipeline:
        """Load the graphs and return the pipeline."""
