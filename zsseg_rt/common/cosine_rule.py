"""How much the cosine of patches and names counts beside a decoder's masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_COSINE_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class CosineRule:
    """Weights of a geometric mean of two probabilities: the mask's, and that of CLIP's cosines.

    A class's probability ``p`` by its mask and its share ``c`` of a softmax over the cosines of a
    patch and all names become ``p ** (1 - w) * c ** w``. A decoder that was trained on few names
    knows these better than CLIP does, and others worse; hence two weights.

    Source: Yu et al., "Convolutions Die Hard: Open-Vocabulary Segmentation with Single Frozen
    Convolutional CLIP" (FC-CLIP), NeurIPS 2023, section 3.3, there for proposed masks.

    Attributes:
        seen_weight: ``w`` of classes that training saw, in [0, 1].
        unseen_weight: ``w`` of all others, in [0, 1].
        scale: Factor of the cosines before the softmax, above 0 and at most 1000.
    """

    seen_weight: float
    unseen_weight: float
    scale: float

    def __post_init__(self) -> None:
        for name in ("seen_weight", "unseen_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected from 0 to 1, got {getattr(self, name)}")
        if self.seen_weight == self.unseen_weight == 0.0:
            raise ValueError("seen_weight, unseen_weight: expected one above 0, got two zeros")
        if not (math.isfinite(self.scale) and 0.0 < self.scale <= MAX_COSINE_SCALE):
            raise ValueError(f"scale: expected above 0 and at most 1000, got {self.scale}")

    def weights(self, seen: npt.NDArray[np.bool_] | None, count: int) -> npt.NDArray[np.float32]:
        """The weight of each of ``count`` phrases, float32 [P]; None means that none is seen."""
        known = np.zeros(count, np.bool_) if seen is None else seen
        return np.where(known, self.seen_weight, self.unseen_weight).astype(np.float32)
