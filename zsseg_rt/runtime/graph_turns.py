"""Graphs of several lanes, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from zsseg_rt.ops import core


class GraphTurns:
    """Lets the graphs of an engine's lanes run one after the other on its GPU.

    Each waits for those that another lane enqueued before, on the GPU: a thread waits only for
    another that enqueues. Off at first, when lanes share the GPU as they come. An engine on the CPU
    never turns it on.
    """

    def __init__(self, device: str) -> None:
        self.is_on = False
        self._index = int(device.partition(":")[2] or 0)
        self._lock, self._thread = threading.Lock(), threading.local()
        self._last: core.Event | None = None

    def last(self) -> tuple[float, float]:
        """The calling thread's last turn, whose end was waited for.

        Returns:
            When the host gave it to the GPU, in seconds of ``time.monotonic``, and the seconds that
            the graphs took there; (0, 0) before the first.
        """
        if not hasattr(self._thread, "began"):
            return 0.0, 0.0
        begin, end = self._thread.events
        return self._thread.began, begin.elapsed_ms(end) / 1000.0

    @contextmanager
    def turn(self, stream: int) -> Iterator[None]:
        """What is enqueued on the stream inside the block takes its turn."""
        if not self.is_on:
            yield
            return
        thread = self._thread
        if not hasattr(thread, "events"):
            thread.events = core.Event(self._index), core.Event(self._index)
        begin, end = thread.events
        with self._lock:
            if self._last is not None:
                self._last.wait(stream)
            thread.began = time.monotonic()
            begin.record(stream)
            try:
                yield
            finally:  # what was enqueued before an error still runs
                end.record(stream)
                self._last = end
