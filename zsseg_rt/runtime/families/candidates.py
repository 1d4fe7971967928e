"""Leaving out the names that are least like anything in a frame, before pixels are labelled."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.text.class_names import BACKGROUND
from zsseg_rt.text.vocabulary import Vocabulary


class CandidateGate:
    """Chooses the classes of a frame that are labelled: one lane's, for one frame at a time.

    A class ranks by its best phrase at its best cell. A class that the frame before kept stays
    while it ranks among the best ``most + most // 2``. Background phrases always stay.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        # Indices of the classes kept of the present frame, ascending; None before they are chosen
        self.classes: tuple[int, ...] | None = None
        self.rows: npt.NDArray[np.int64] | None = None  # their phrases and the background's, [R]
        self.seen: Any | None = None  # which phrases training saw, bool [P] on the host
        self._past: Any | None = None  # the frame's turn, whose candidates are those before

    def begin(self, seen: Any | None, past: Any | None) -> None:
        """Begin a frame; ``past``, its turn with a memory, is told of the choice."""
        self.classes, self.rows, self.seen, self._past = None, None, seen, past

    def leaves_out(self, vocabulary: Vocabulary) -> bool:
        """Whether there are more classes than it keeps."""
        return len(vocabulary.names) > self.most

    def names(self, vocabulary: Vocabulary) -> tuple[str, ...] | None:
        """The classes kept, in the caller's order."""
        if self.classes is None:
            return None
        return tuple(vocabulary.names[index] for index in self.classes)

    def choose(
        self, best: npt.NDArray[np.float32], vocabulary: Vocabulary
    ) -> npt.NDArray[np.int64]:
        """Choose by how near each phrase is to its best cell, float32 [P]; returns ``rows``."""
        owners, count = vocabulary.phrase_classes, len(vocabulary.names)
        is_named = owners != BACKGROUND
        scores = np.full(count, -np.inf, np.float32)
        np.maximum.at(scores, owners[is_named], best[is_named])
        rank = np.empty(count, np.int64)
        rank[np.argsort(-scores, kind="stable")] = np.arange(count)
        candidates = rank < self.most
        before = np.array(() if self._past is None else self._past.candidates, np.int64)
        candidates[before] |= rank[before] < self.most + self.most // 2
        self.classes = tuple(np.flatnonzero(candidates).tolist())
        if self._past is not None:
            self._past.candidates = self.classes
        self.rows = np.flatnonzero(~is_named | candidates[owners])
        return self.rows
