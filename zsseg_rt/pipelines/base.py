"""The contract of a pipeline, and what all of them need to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle, HeadSpec
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace

__all__ = ["BoundClasses", "GraphLoader", "Pipeline", "Trace", "seen_phrases"]

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
    """

    vocabulary: Vocabulary
    seen: npt.NDArray[np.bool_] | None
    text_embeds: Array
    text_queries: Array | None = None


def seen_phrases(vocabulary: Vocabulary, head: HeadSpec) -> npt.NDArray[np.bool_] | None:
    """Which phrases name a class that training saw; None if the bundle names none."""
    return np.isin(vocabulary.phrases, head.seen) if head.seen else None


class Pipeline(Protocol):
    """From image to low-resolution class logits."""

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Precompute what depends on the classes alone."""

    def mask_logits(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> Array:
        """Compute class logits.

        Args:
            image: float32 [1, 3, h, w], preprocessed, on the device.
            classes: What :meth:`bind` gave.
            clock: Marked at the end of every stage.
            trace: Receives every intermediate, for self-checks.

        Returns:
            float32 [1, P, gh, gw] on the device, valid until the next call.
        """


class PipelineFactory(Protocol):
    """How a family's pipeline is made."""

    def __call__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> Pipeline:
        """Load the graphs and return the pipeline."""
