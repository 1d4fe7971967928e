"""Reading a source in a thread of its own, opened anew whenever a camera was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

from zsseg_rt.errors import SourceError, ZssegError
from zsseg_rt.stream.hand_off import HandOff
from zsseg_rt.stream.source import FramePathName, Picture, Source
from zsseg_rt.stream.watch import SourceWatch

_LONGEST_GAP = 10.0  # seconds; times further apart were put together, and nobody waits for them


class _Attempt:
    """One thread that reads a source until it ends, fails or is told to stop.

    A thread may hang for ever in a camera's driver. It is abandoned then: it is a daemon, nobody
    waits for it, and whatever it still gives is discarded.
    """

    def __init__(self, source: Source, offer: Callable[[_Attempt, Picture], bool]) -> None:
        self.is_over = False
        self.error: ZssegError | None = None
        self.frames = 0
        self.seen_at = 0.0  # when it gave the last of them
        self.damaged = 0
        self.late_since: float | None = None
        self._source, self._offer = source, offer
        self._stop = threading.Event()
        self._on_over: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._read, name=f"read {source.name}", daemon=True)

    def start(self, on_over: Callable[[], None]) -> None:
        self._on_over = on_over
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self, seconds: float) -> None:
        if threading.current_thread() is not self._thread:  # a forgotten stream ends in any thread
            self._thread.join(seconds)

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        return self._stop.wait(max(seconds, 0.0))

    def count_damaged(self) -> None:
        self.damaged += 1

    def _read(self) -> None:
        # Any other error is printed by the thread, and the source must not look sound.
        self.error = SourceError(f"{self._source.name}: reading failed, see the traceback above")
        try:
            with closing(self._source.pictures(self)) as pictures:
                for picture in pictures:
                    if not self._offer(self, picture):
                        break
            self.error = None
        except ZssegError as exc:
            self.error = _without_frames(exc)
        finally:
            self.is_over = True
            self._on_over()


def _without_frames(error: ZssegError) -> ZssegError:
    """The error alone: the stack frames that it came through keep a decoder and its threads."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


class Capture:
    """Keeps one source going. All methods belong to the thread that takes frames."""

    def __init__(
        self,
        source: Source,
        slot: int,
        hand_off: HandOff,
        watch: SourceWatch,
        *,
        paced: bool,
    ) -> None:
        self.watch = watch
        self.name = source.name
        self.path: FramePathName = "host"  # of its newest frame
        self.fell_behind = 0  # times that it was opened anew since its frames came late
        self._source, self._slot, self._hand_off = source, slot, hand_off
        self._paced = paced
        self._start: float | None = None
        self._last_stamp = 0.0
        self._attempt: _Attempt | None = None
        self._frames = 0  # of this attempt that the watch knows of
        self._damaged = 0  # in attempts that are over

    def tick(self) -> float | None:
        """Look what became of the source, and open it or give it up where it is time.

        Returns:
            Seconds until the next look; None if only the source itself can bring news.
        """
        self.look()
        now = time.monotonic()
        action = self.watch.tick(now)
        if action == "open":
            self._attempt, self._frames = _Attempt(self._source, self._offer), 0
            self._attempt.start(self._hand_off.nudge)
        elif action == "abandon":
            self._drop_attempt()
            self._hand_off.nudge()  # it may wait for room
        return self.watch.next_tick(now)

    def look(self) -> None:
        """Tell the watch what became of the source."""
        attempt = self._attempt
        if attempt is None:
            return
        is_over = attempt.is_over  # before its frames are looked at: the last one counts
        frames = attempt.frames
        if frames > self._frames:
            self._frames = frames
            self.watch.frame(attempt.seen_at)
        if frames and self._hand_off.lets_wait(self._slot):
            self.watch.frame(time.monotonic())  # it is we who are slow
        if is_over:
            self._drop_attempt()
            self.watch.over(time.monotonic(), attempt.error)

    def refuse(self, error: ZssegError) -> None:
        """Lose the source: a frame of it cannot be labelled. What it has waiting is dropped."""
        self._drop_attempt()
        self._hand_off.discard(self._slot)  # wakes the thread, which may wait for room
        self.watch.refuse(time.monotonic(), error)

    @property
    def damaged(self) -> int:
        """Packets and frames that could not be decoded."""
        return self._damaged + (0 if self._attempt is None else self._attempt.damaged)

    def stop(self) -> None:
        """Tell the thread to stop; safe in a signal handler."""
        if self._attempt is not None:
            self._attempt.stop()

    def join(self, seconds: float) -> None:
        """Wait for the thread for so long, then leave it to itself."""
        if self._attempt is not None:
            self._attempt.join(seconds)

    def _drop_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.stop()
            self._damaged += self._attempt.damaged
            self._attempt = None

    def _offer(self, attempt: _Attempt, picture: Picture) -> bool:
        """Put a picture into the slot, in the reading thread."""
        if self._paced and self._is_stopped_before_its_time(attempt, picture):
            return False
        attempt.seen_at = time.monotonic()
        if self._source.live and not self._hand_off.keeps_all(self._slot):
            self._refuse_if_late(attempt, picture)
        attempt.frames += 1
        self.path = picture.path
        return self._hand_off.put(self._slot, picture, lambda: not attempt.is_stopped)

    def _refuse_if_late(self, attempt: _Attempt, picture: Picture) -> None:
        """Give up a source that is behind and does not catch up; what waits on the way goes."""
        patience = self.watch.patience
        if picture.late < patience.late_by:
            attempt.late_since = None
            return
        attempt.late_since = attempt.late_since or attempt.seen_at
        if attempt.seen_at - attempt.late_since >= patience.late_for and not attempt.is_stopped:
            self.fell_behind += 1
            raise SourceError(
                f"{self.name}: frames come {picture.late:.1f} s late. The link or this machine is "
                "too slow for them: choose a smaller picture or rate in the camera's settings."
            )

    def _is_stopped_before_its_time(self, attempt: _Attempt, picture: Picture) -> bool:
        stamp, now = picture.pts_seconds or 0.0, time.monotonic()
        jumps = not 0.0 <= stamp - self._last_stamp <= _LONGEST_GAP
        if self._start is None or jumps:
            self._start = now - stamp
        self._last_stamp = stamp
        return attempt.wait(self._start + stamp - now)
