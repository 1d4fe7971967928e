"""Several frames at once: every lane of an engine, and work whose results stay in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Generic, TypeVar

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


class InOrder(Generic[_Job, _Result]):
    """Work on several jobs at once, whose results keep the jobs' order; for one thread."""

    def __init__(
        self,
        work: Callable[[_Job], _Result],
        num_threads: int,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._on_close = work, on_close
        self._own_threads: set[int] = set()
        self._num_threads = num_threads
        self._threads = num_threads and ThreadPoolExecutor(
            num_threads, "label", lambda: self._own_threads.add(threading.get_ident())
        )
        self._begun: deque[Future[_Result]] = deque()

    def next(self, next_job: Callable[[], _Job]) -> _Result:
        """The oldest job's result; so many jobs are begun as there are threads, and one waits."""
        if not self._threads:
            return self._work(next_job())
        try:
            while len(self._begun) <= self._num_threads:
                self._begun.append(self._threads.submit(self._work, next_job()))
        except StopIteration:
            if not self._begun:
                raise
        return self._begun.popleft().result()

    def close(self) -> None:
        """Discard what waits, and finish what is being worked on."""
        if threading.get_ident() in self._own_threads:  # a forgotten stream ends in any thread
            threading.Thread(target=self._finish, daemon=True).start()
        else:
            self._finish()

    def _finish(self) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        self._begun.clear()
        self._on_close()


def in_order(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], *, num_threads: int
) -> Generator[_Result, None, None]:
    """Yield ``work(job)`` of each job, in the order of the jobs.

    At most ``num_threads`` jobs run, and as many results wait, at any time. When the iterator is
    closed or fails, jobs that have not begun are not begun; those under way are waited for.
    """
    results, next_job = InOrder(work, num_threads), iter(jobs).__next__
    with closing(results):
        while True:
            try:
                result = results.next(next_job)
            except StopIteration:
                return
            yield result
