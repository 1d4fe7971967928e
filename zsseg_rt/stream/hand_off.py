"""Where capture threads leave pictures, and the labelling thread takes them in turns."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from zsseg_rt.results.segmentation import Frame
from zsseg_rt.stream.source import Picture

QUEUE = 4  # pictures that policy all lets a source read ahead
MOST_ON_GPU = 32  # frames that callers may keep in a GPU's memory; older ones leave it


@dataclass(kw_only=True)
class _Slot:
    source: str
    keeps_all: bool
    waiting: deque[tuple[int, Picture]] = field(default_factory=deque)
    captured: int = 0  # pictures that the source has given
    dropped: int = 0
    last_taken: int = -1

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= (QUEUE if self.keeps_all else 1)

    def add(self, picture: Picture) -> None:
        self.captured += picture.dropped_before
        self.dropped += picture.dropped_before
        if self.is_full:
            self.drop_oldest()
        self.waiting.append((self.captured, picture))
        self.captured += 1

    def drop_oldest(self) -> None:
        self.waiting.popleft()
        self.dropped += 1

    def take(self) -> Frame:
        index, picture = self.waiting.popleft()
        before, self.last_taken = index - self.last_taken - 1, index
        return Frame(
            source=self.source,
            index=index,
            captured_at=picture.captured_at,
            clock=picture.clock,
            pts_seconds=picture.pts_seconds,
            dropped_before=before,
            image=picture.image,  # type: ignore[arg-type]  # made when it is asked for
            on_gpu=picture.on_gpu,
        )


class HandOff:
    """One slot per source; safe to use from any thread, and from a signal handler."""

    def __init__(
        self,
        keeps_all: Mapping[str, bool],
        *,
        max_staleness: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = [_Slot(source=name, keeps_all=keeps) for name, keeps in keeps_all.items()]
        self._max_staleness, self._now = max_staleness, now
        self._changed = threading.Condition(threading.RLock())
        self._next = 0  # the slot whose turn it is
        self._nudged = False
        self._closed = False
        self._on_gpu: deque[weakref.ref[Frame]] = deque()

    def put(self, slot: int, picture: Picture, is_wanted: Callable[[], bool]) -> bool:
        """Leave a picture; with policy ``all`` this waits for room."""
        mine = self._slots[slot]
        with self._changed:
            if mine.keeps_all:
                self._changed.wait_for(lambda: self._closed or not mine.is_full or not is_wanted())
            if self._closed or not is_wanted():
                return False
            mine.add(picture)
            self._changed.notify_all()
        return True

    def take(self, timeout: float | None) -> Frame | None:
        """Wait for a frame; of several sources each gets its turn."""
        with self._changed:
            self._changed.wait_for(self._has_news, timeout)
            self._nudged = False
            if self._closed:
                return None
            for turn in range(len(self._slots)):
                position = (self._next + turn) % len(self._slots)
                slot = self._slots[position]
                if slot.waiting:
                    self._next = position + 1
                    self._changed.notify_all()
                    frame = slot.take()
                    break
            else:
                return None
        if frame.on_gpu is not None:
            self._make_room(frame)
        return frame

    def _make_room(self, frame: Frame) -> None:
        """Let the oldest frame that somebody keeps leave the GPU, once there are too many."""
        self._on_gpu = deque(one for one in self._on_gpu if one() is not None)
        self._on_gpu.append(weakref.ref(frame))
        if len(self._on_gpu) > MOST_ON_GPU and (oldest := self._on_gpu.popleft()()) is not None:
            oldest.leave_gpu()

    def nudge(self) -> None:
        with self._changed:
            self._nudged = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more pictures and give none; whoever waits goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_empty(self) -> bool:
        """Whether no frame waits."""
        with self._changed:
            self._drop_stale()
            return not any(slot.waiting for slot in self._slots)

    def discard(self, slot: int) -> None:
        with self._changed:
            while self._slots[slot].waiting:
                self._slots[slot].drop_oldest()
            self._changed.notify_all()

    def keeps_all(self, slot: int) -> bool:
        """Whether no picture of a source may be lost."""
        return self._slots[slot].keeps_all

    def lets_wait(self, slot: int) -> bool:
        """Whether a source has to wait for room."""
        return self._slots[slot].keeps_all and self._slots[slot].is_full

    def counts(self, slot: int) -> tuple[int, int]:
        """How many pictures a source has given, and how many of them were dropped."""
        with self._changed:
            return self._slots[slot].captured, self._slots[slot].dropped

    def _has_news(self) -> bool:
        self._drop_stale()
        return self._closed or self._nudged or any(slot.waiting for slot in self._slots)

    def _drop_stale(self) -> None:
        if self._max_staleness is None:
            return
        oldest = self._now() - self._max_staleness
        for slot in self._slots:
            while slot.waiting and slot.waiting[0][1].captured_at < oldest:
                slot.drop_oldest()
                self._changed.notify_all()
