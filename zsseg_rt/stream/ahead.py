"""Frames that are labelled at the same time, and handed out in order."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from zsseg_rt.errors import EndOfSource
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.graph_turns import GraphTurns
from zsseg_rt.stream.hand_off import HandOff

_Result = TypeVar("_Result")
_PAST = 32  # frames that tell how long the next one will take
_LOOK = 0.3  # seconds; also ended by a nudge of the hand-off


class Lanes(Protocol):
    """What labels several frames at the same time."""

    @property
    def num_lanes(self) -> int:
        """How many frames."""

    @property
    def turns(self) -> GraphTurns | None:
        """How the lanes' graphs take turns; None if they do not."""

    def segment(self, frame: Any) -> Segmentation:
        """Label a frame; may be called in as many threads."""

    def close(self) -> None:
        """Free the lanes."""


class Ahead(Generic[_Result]):
    """Work on frames in threads of its own; all methods belong to one other thread."""

    def __init__(self, work: Callable[[Frame], _Result], lanes: Lanes, hand_off: HandOff) -> None:
        self._work, self._lanes, self._hand_off = work, lanes, hand_off
        self._own_threads: set[int] = set()
        self._threads: Executor = ThreadPoolExecutor(
            lanes.num_lanes, "label", lambda: self._own_threads.add(threading.get_ident())
        )
        self._begun: deque[Future[Any]] = deque()

    def next(
        self, next_frame: Callable[[], Frame], look: Callable[[float], Frame | None]
    ) -> _Result:
        """The oldest frame's result; as many frames are begun as there are lanes, and one waits.

        Args:
            next_frame: Waits for a frame.
            look: Waits for a frame, at most so many seconds.

        Raises:
            EndOfSource: Of ``next_frame``, or the hand-off is closed.
        """
        try:
            while len(self._begun) <= self._lanes.num_lanes:
                self._begun.append(self._threads.submit(self._work, next_frame()))
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


class Pace:
    """When the frame after this one may begin; driven only by times, in seconds.

    Just in time: its preprocessing ends with this one's graphs, and hardly earlier, so that its
    labels are as old as if it had been chosen alone. Of the last frames, the quickest preparation
    and the slowest graphs count: a frame that begins too late costs rate, too early it is older.
    """

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=_PAST)  # the host's part before graphs
        self._rests: deque[float] = deque(maxlen=_PAST)  # the GPU's before, and the copy of labels
        self._graphs: deque[float] = deque(maxlen=_PAST)
        self._away: deque[float] = deque(maxlen=_PAST)
        self._ended = -math.inf

    def frame(self, chosen: float, given: float, graphs: float, ended: float) -> None:
        """When it was chosen and given to the GPU, its graphs' time, when labels were there."""
        self._starts.append(given - chosen)
        self._graphs.append(graphs)
        if given >= self._ended:  # nothing was in its way
            self._rests.append(ended - given - graphs)
        self._ended = ended

    def away(self, seconds: float) -> None:
        """How long the caller had a result before it asks for the next."""
        self._away.append(seconds)

    @property
    def is_known(self) -> bool:
        """Whether a frame may begin before it is asked for: its labels will not have to wait."""
        return bool(self._graphs) and max(self._away) <= min(self._graphs)

    def next_begins(self, chosen: float) -> float:
        """When the frame after one that was chosen then may begin."""
        start, rest = min(self._starts), min(self._rests)
        ends = max(chosen + start + rest, self._ended) + max(self._graphs)
        return ends - rest - start


class InTime(Ahead[_Result]):
    """Begins the next frame of cameras while this one's graphs run.

    Where nothing is gained by that, frames are labelled in the calling thread: where none waits,
    since labels are quicker than frames, and where the caller takes longer than graphs.
    """

    def __init__(
        self,
        work: Callable[[Frame], _Result],
        lanes: Lanes,
        hand_off: HandOff,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(work, lanes, hand_off)
        self._now, self._pace = now, Pace()
        self._chosen: deque[float] = deque()  # when; of frames that were begun
        self._left: float | None = None  # when the caller was given the last result

    def next(
        self, next_frame: Callable[[], Frame], look: Callable[[float], Frame | None]
    ) -> _Result:
        """The oldest frame's result; another may have been begun."""
        if self._left is not None:
            self._pace.away(self._now() - self._left)
        if self._hand_off.is_closed:
            next_frame()  # says so
        if not self._begun and (self._hand_off.is_empty or not self._pace.is_known):
            result, *times = self._timed(next_frame(), self._now())
        else:
            if not self._begun:
                self._begin(next_frame())
            if self._pace.is_known:
                self._begin_another(look)
            self._chosen.popleft()
            result, *times = self._begun.popleft().result()
        if times[1] >= times[0]:  # else it was refused before its turn
            self._pace.frame(*times)
        self._left = self._now()
        return result

    def _begin(self, frame: Frame) -> None:
        chosen = self._now()
        self._chosen.append(chosen)
        begun = self._threads.submit(self._timed, frame, chosen)
        self._begun.append(begun)
        begun.add_done_callback(lambda _: self._hand_off.nudge())

    def _begin_another(self, look: Callable[[float], Frame | None]) -> None:
        """Begin a frame before the oldest one's end, or then."""
        oldest = self._begun[0]
        while len(self._begun) == 1:
            is_done = oldest.done()
            early = 0.0 if is_done else self._pace.next_begins(self._chosen[0]) - self._now()
            if early > 0.0:
                with suppress(Late):
                    oldest.exception(early)
                continue
            try:
                frame = look(0.0 if is_done else _LOOK)
            except EndOfSource:
                return
            if frame is not None:
                self._begin(frame)
            elif is_done:
                return

    def _timed(self, frame: Frame, chosen: float) -> tuple[_Result, float, float, float, float]:
        assert self._lanes.turns is not None
        result = self._work(frame)
        ended = self._now()
        return result, chosen, *self._lanes.turns.last(), ended


def start_ahead(
    work: Callable[[Frame], _Result], lanes: Lanes, hand_off: HandOff
) -> Ahead[_Result]:
    """Work in the lanes: at the same time, or in turn if they take turns."""
    return (Ahead if lanes.turns is None else InTime)(work, lanes, hand_off)
