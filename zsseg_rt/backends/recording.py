"""A session that remembers what it was fed, so that its nodes can be timed on real input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping

import numpy as np

from zsseg_rt.backends.base import OUTSIDE_NODES, GraphSession, NodeTime, Recorder, Session
from zsseg_rt.common.arrays import Array


class RecordingSession(GraphSession):
    """Runs another session and keeps its feeds, on the CPU as copies, on a GPU the arrays."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._session = session
        self._feeds: list[dict[str, Array]] = []

    @property
    def feeds(self) -> tuple[Mapping[str, Array], ...]:
        """The feeds so far."""
        return tuple(self._feeds)

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Run the graph once; see :class:`zsseg_rt.backends.base.Session`."""
        copies = {n: np.array(a) if isinstance(a, np.ndarray) else a for n, a in feeds.items()}
        self._feeds.append(copies)
        return self._session.run(feeds, stream=stream)

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        """See :class:`zsseg_rt.backends.base.Session`."""
        return self._session.profile(feeds, stream=stream, runs=runs)

    def profile_recorded(self, *, stream: int = 0, runs: int = 10) -> tuple[NodeTime, ...]:
        """Time the nodes on everything that was fed; a node that ran often counts as often."""
        if len(self._feeds) == 1:
            return self.profile(self._feeds[0], stream=stream, runs=runs)
        totals: dict[tuple[float, str, str], float] = defaultdict(float)
        for feeds in self._feeds:
            for place, node in enumerate(self.profile(feeds, stream=stream, runs=runs)):
                last = node.name == OUTSIDE_NODES
                totals[math.inf if last else place, node.name, node.type] += node.ms
        return tuple(NodeTime(name=n, type=t, ms=ms) for (_, n, t), ms in sorted(totals.items()))

    def capture_state(self) -> Hashable | None:
        """None: what it is fed is kept, so it is not captured."""
        return None

    def recorder(self) -> Recorder | None:
        """See :class:`zsseg_rt.backends.base.Session`."""
        return self._session.recorder()

    def close(self) -> None:
        """Forget the feeds; the session stays open."""
        self._feeds.clear()
