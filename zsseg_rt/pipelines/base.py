"""The contract of a pipeline, and what all of them need to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle, HeadSpec
from zsseg_rt.text.tokenizer import clean_text
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace

__all__ = [
    "BoundClasses",
    "GraphLoader",
    "LabelRule",
    "Labels",
    "Masks",
    "Pipeline",
    "PipelineFactory",
    "Trace",
    "seen_phrases",
]

GraphLoader = Callable[[str], Session]
"""Loads the bundle's graph of that name on the engine's backend, device and precision."""

Trace = dict[str, Array]
"""Receives every intermediate array by its name in the golden sample."""

Labels = tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]
"""A label for every pixel and, if wanted, its score."""


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


class Masks(Protocol):
    """What a pipeline makes of a picture: small masks that know how to label pixels."""

    @property
    def mask_logits(self) -> Array:
        """float32 [..., gh, gw] on the device, valid until the next frame."""

    def label(
        self,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        space: Workspace,
        clock: StageClock,
    ) -> Labels:
        """Label every pixel with a phrase, in one kernel call.

        Args:
            out_hw: Height and width of the result.
            classes: The classes in force.
            rule: How scores become labels.
            space: Where buffers and the stream are.
            clock: Marked at the end of the stage ``upsample_argmax``.

        Returns:
            Phrase labels [H, W] and their scores float32 [H, W] or None, in host memory.
        """


def seen_phrases(phrases: Sequence[str], head: HeadSpec) -> npt.NDArray[np.bool_] | None:
    """Which phrases name a class that training saw; None if the bundle names none.

    Names that the tokenizer reads alike are alike: "Blue  sky" is "blue sky".
    """
    if not head.seen:
        return None
    seen = {clean_text(name) for name in head.seen}
    return np.array([clean_text(phrase) in seen for phrase in phrases])


class Pipeline(Protocol):
    """From an image to masks, one file a family."""

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Precompute what depends on the classes alone."""

    def masks(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> Masks:
        """Run the graphs and compare what they give with the classes.

        Args:
            image: float32 [1, 3, h, w], preprocessed, on the device.
            classes: What :meth:`bind` gave.
            clock: Marked at the end of every stage.
            trace: Receives every intermediate, for self-checks.

        Returns:
            Masks that are valid until the next call.

        Raises:
            BackendError: A graph gave NaN or infinity where a class is decided on the host.
        """


class PipelineFactory(Protocol):
    """How a family's pipeline is made."""

    def __call__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> Pipeline:
        """Load the graphs and return the pipeline."""
