"""Work on several things at once, with results in order and bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Budget", "in_order"]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_order(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], *, num_threads: int
) -> Generator[_Result, None, None]:
    """Yield ``work(job)`` of each job, in the order of the jobs.

    At most ``num_threads`` jobs run, and as many results wait, at any time. When the iterator is
    closed or fails, jobs that have not begun are not begun; those under way are waited for.

    Args:
        work: Called in threads of its own.
        jobs: What to work on; taken as they are needed, in the caller's thread.
        num_threads: Jobs at the same time, at least 1.
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


class Budget:
    """An amount that is shared by threads; who needs more than is left waits.

    Args:
        amount: What there is. Who needs more than all of it gets it when nobody else has any.
    """

    def __init__(self, amount: int) -> None:
        self._amount = self._left = amount
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, needed: int) -> Iterator[None]:
        """Hold so much for the time of a ``with`` block."""
        share = min(needed, self._amount)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= share)
            self._left -= share
        try:
            yield
        finally:
            with self._changed:
                self._left += share
                self._changed.notify_all()
