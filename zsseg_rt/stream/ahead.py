"""Frames that are labelled at the same time, and handed out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from zsseg_rt.errors import EndOfSource
from zsseg_rt.runtime.lane_pool import LanePool
from zsseg_rt.stream.hand_off import HandOff

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Ahead(Generic[_Job, _Result]):
    """Work on frames in threads of its own; all methods belong to one other thread."""

    def __init__(
        self,
        work: Callable[[_Job], _Result],
        lanes: LanePool,
        hand_off: HandOff,
        *,
        every: int = 1,
    ) -> None:
        self._work, self._lanes, self._hand_off = work, lanes, hand_off
        self._most = lanes.num_lanes * every  # one of so many frames takes a lane
        self._own_threads: set[int] = set()
        self._threads: Executor = ThreadPoolExecutor(
            lanes.num_lanes, "label", lambda: self._own_threads.add(threading.get_ident())
        )
        self._begun: deque[Future[Any]] = deque()

    def next(self, next_job: Callable[[], _Job]) -> _Result:
        """The oldest frame's result; as many frames are begun as there are lanes, and one waits.

        Raises:
            EndOfSource: Of ``next_job``, which waits for a frame, or the hand-off is closed.
        """
        try:
            while len(self._begun) <= self._most:
                self._begun.append(self._threads.submit(self._work, next_job()))
        except EndOfSource:
            if self._hand_off.is_closed or not self._begun:
                raise
        result: _Result = self._begun.popleft().result()
        return result

    def close(self) -> None:
        """Discard what waits, finish what is being worked on, free the lanes."""
        if threading.get_ident() in self._own_threads:  # a forgotten stream ends in any thread
            threading.Thread(target=self._finish, daemon=True).start()
        else:
            self._finish()

    def _finish(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._begun.clear()
        self._lanes.close()
