"""A session that remembers what it was fed, so that its nodes can be timed on real input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from zsseg_rt.backends.base import OUTSIDE_NODES, GraphSession, NodeTime, Session
from zsseg_rt.common.arrays import Array


class RecordingSession(GraphSession):
    """Runs another session and keeps its feeds, on the CPU as copies, on a GPU the arrays."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._session = session
        self.feeds: list[Mapping[str, Array]] = []

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Run the graph once."""
        copies = {n: np.array(a) if isinstance(a, np.ndarray) else a for n, a in feeds.items()}
        self.feeds.append(copies)
        return self._session.run(feeds, stream=stream)

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        """Time the nodes on other feeds."""
        return self._session.profile(feeds, stream=stream, runs=runs)

    def profile_recorded(self, *, stream: int = 0, runs: int = 10) -> tuple[NodeTime, ...]:
        """Time the nodes on everything that was fed; a node that ran often counts as often."""
        totals: dict[tuple[float, str, str], float] = defaultdict(float)
        for feeds in self.feeds:
            for place, node in enumerate(self.profile(feeds, stream=stream, runs=runs)):
                last = node.name == OUTSIDE_NODES
                totals[math.inf if last else place, node.name, node.type] += node.ms
        return tuple(NodeTime(name=n, type=t, ms=ms) for (_, n, t), ms in sorted(totals.items()))

    def capture_state(self) -> None:
        """None: what it is fed is kept, so it is not captured."""

    def recorder(self) -> None:
        """None: nothing is captured."""

    def close(self) -> None:
        """Nothing: the session stays open."""
