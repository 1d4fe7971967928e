"""Frames that are labelled at the same time, and handed out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from zsseg_rt.results.segmentation import Frame, Segmentation

_Result = TypeVar("_Result")


class Lanes(Protocol):
    """What labels several frames at the same time."""

    @property
    def num_lanes(self) -> int:
        """How many frames."""

    def segment(self, frame: Any) -> Segmentation:
        """Label a frame; may be called in as many threads."""

    def close(self) -> None:
        """Free the lanes."""


class Ahead(Generic[_Result]):
    """Work on frames in threads of its own; all methods belong to one other thread."""

    def __init__(self, work: Callable[[Frame], _Result], lanes: Lanes) -> None:
        self._work, self._lanes = work, lanes
        self._own_threads: set[int] = set()
        self._threads = ThreadPoolExecutor(
            lanes.num_lanes, "label", lambda: self._own_threads.add(threading.get_ident())
        )
        self._begun: deque[Future[_Result]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another frame may begin: one per lane, and one that waits for the first free."""
        return len(self._begun) <= self._lanes.num_lanes

    @property
    def is_empty(self) -> bool:
        """Whether nothing was begun that has not been handed out."""
        return not self._begun

    def begin(self, frame: Frame) -> None:
        """Work on a frame."""
        self._begun.append(self._threads.submit(self._work, frame))

    def take(self) -> _Result:
        """Wait for the oldest frame."""
        return self._begun.popleft().result()

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
