"""Several frames at once: every lane of an engine, and work whose results stay in order."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.lane import Lane

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class LanePool:
    """Labels frames in the engine's own lane and in further ones; usable from any thread."""

    def __init__(
        self,
        segment: Callable[[npt.NDArray[np.uint8]], Segmentation],
        open_lane: Callable[[], Lane],
        num_lanes: int,
    ) -> None:
        self.num_lanes = num_lanes
        self._free: queue.SimpleQueue[Callable[[npt.NDArray[np.uint8]], Segmentation]]
        self._free = queue.SimpleQueue()
        self._free.put(segment)
        with ExitStack() as opened:
            for _ in range(num_lanes - 1):
                self._free.put(opened.enter_context(open_lane()).segment)
            self._opened = opened.pop_all()

    def segment(self, frame: npt.NDArray[np.uint8]) -> Segmentation:
        """Label a frame in the next free lane; see :meth:`Lane.segment`."""
        lane = self._free.get()
        try:
            return lane(frame)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """Close the further lanes. Calling it twice is harmless."""
        self._opened.close()

    def __enter__(self) -> LanePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def in_order(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], *, num_threads: int
) -> Generator[_Result, None, None]:
    """Yield ``work(job)`` of each job, in the order of the jobs.

    At most ``num_threads`` jobs run, and as many results wait, at any time. When the iterator is
    closed or fails, jobs that have not begun are not begun; those under way are waited for.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
