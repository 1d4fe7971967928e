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
class Slot:
    """The pictures of one source that wait."""

    source: str
    keeps_all: bool  # Whether no picture may be lost
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
        self.slots = [Slot(source=name, keeps_all=keeps) for name, keeps in keeps_all.items()]
        self._max_staleness, self._now = max_staleness, now
        self._changed = threading.Condition(threading.RLock())
        self._next = 0  # the slot whose turn it is
        self._nudged = False
        self.is_closed = False
        self._on_gpu: deque[weakref.ref[Frame]] = deque()

    def put(self, slot: Slot, picture: Picture, is_wanted: Callable[[], bool]) -> bool:
        """Leave a picture; with policy ``all`` this waits for room."""
        with self._changed:
            if slot.keeps_all:
                self._changed.wait_for(
                    lambda: self.is_closed or not slot.is_full or not is_wanted()
                )
            if self.is_closed or not is_wanted():
                return False
            slot.add(picture)
            self._changed.notify_all()
        return True

    def take(self, timeout: float | None) -> Frame | None:
        """Wait for a frame; of several sources each gets its turn."""
        with self._changed:
            self._changed.wait_for(self._has_news, timeout)
            self._nudged = False
            if self.is_closed:
                return None
            for turn in range(len(self.slots)):
                position = (self._next + turn) % len(self.slots)
                slot = self.slots[position]
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
            self.is_closed = True
            self._changed.notify_all()

    @property
    def is_empty(self) -> bool:
        """Whether no frame waits."""
        with self._changed:
            self._drop_stale()
            return not any(slot.waiting for slot in self.slots)

    def discard(self, slot: Slot) -> None:
        with self._changed:
            while slot.waiting:
                slot.drop_oldest()
            self._changed.notify_all()

    def _has_news(self) -> bool:
        self._drop_stale()
        return self.is_closed or self._nudged or any(slot.waiting for slot in self.slots)

    def _drop_stale(self) -> None:
        if self._max_staleness is None:
            return
        oldest = self._now() - self._max_staleness
        for slot in self.slots:
            while slot.waiting and slot.waiting[0][1].captured_at < oldest:
                slot.drop_oldest()
                self._changed.notify_all()
