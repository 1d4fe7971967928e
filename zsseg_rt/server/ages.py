"""How old frames were when their labels came."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from itertools import accumulate

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


@dataclass
class AgeHistogram:
    """Ages of one source's frames, counted by how long they are.

    Attributes:
        total: Sum of all ages in seconds.
        counts: Frames per bucket; the last holds what is older than every bound.
    """

    total: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))

    @property
    def count(self) -> int:
        """Number of frames."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Count a frame."""
        self.total += seconds
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1

    def cumulative(self) -> list[tuple[str, int]]:
        """Upper bounds of the buckets, as Prometheus writes them, and the frames up to there."""
        bounds = [*map(str, _BOUNDS), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))
