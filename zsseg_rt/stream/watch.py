"""The state of a source, and when to try it again; decided by times alone, without threads."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from zsseg_rt.errors import SourceError, ZssegError

SourceState = Literal["starting", "running", "stalled", "lost", "ended"]
Action = Literal["open", "abandon", "none"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a camera is waited for, in seconds."""

    stalled_after: float = 2.0  # Without a frame, it counts as stalled
    lost_after: float = 10.0  # Without a frame, it counts as lost and is opened anew
    first_retry: float = 0.5  # From the loss to the first attempt to open it again
    longest_retry: float = 5.0  # The wait doubles with every attempt, up to this
    # Where only the newest frame counts, a camera whose frames come so late by its own clock is
    # opened anew
    late_by: float = 3.0
    late_for: float = 1.0  # Once they have been late for this long
    # Whether cameras that fail before any has given a frame are waited for too
    at_start: bool = False


def jitter() -> float:
    """A factor around 1, so that cameras that were lost together are not tried together."""
    return random.uniform(0.8, 1.2)


class SourceWatch:
    """The state of one source. Tell it what happens; :meth:`tick` says what to do."""

    def __init__(
        self,
        name: str,
        *,
        live: bool,
        patience: Patience,
        spread: Callable[[], float] = jitter,
    ) -> None:
        self.state: SourceState = "starting"
        self.error: ZssegError | None = None
        self.reconnects = 0
        self.ran = False
        self._name, self.is_live, self.patience, self._spread = name, live, patience, spread
        self._news: list[tuple[int, str]] = []
        self._is_open = False
        self._seen_at = 0.0  # when it was opened, or gave its last frame
        self._retry_at = float("-inf")
        self._retry_after = patience.first_retry

    @property
    def is_awaited(self) -> bool:
        """Whether it is a camera that may be away at the start."""
        return self.is_live and self.patience.at_start

    def frame(self, at: float) -> None:
        """It gave a frame at that time, or waits for one to be taken."""
        self._seen_at = max(self._seen_at, at)
        if self.state == "running":
            return
        if self.state == "lost" and self.ran:
            self.reconnects += 1
        self.ran, self.error = True, None
        self._retry_after = self.patience.first_retry
        self._change("running")

    def over(self, at: float, error: ZssegError | None) -> None:
        """Reading it came to an end at that time, with an error or without."""
        self._is_open = False
        if self.is_live:
            self._lose(at, error or SourceError(f"{self._name}: the camera's stream ended"))
            return
        self.error = error
        self._change("ended")

    def refuse(self, at: float, error: ZssegError) -> None:
        """A frame of it could not be labelled; the next one may be no better, so it can wait."""
        self._retry_after = self.patience.longest_retry
        self.over(at, error)

    def tick(self, now: float) -> Action:
        """Return the next action: open it, abandon the thread that reads it, or nothing."""
        if self.state == "ended":
            return "none"
        if not self._is_open:
            if now < self._retry_at:
                return "none"
            self._is_open, self._seen_at = True, now
            return "open"
        silent = now - self._seen_at
        if not self.is_live or silent < self.patience.stalled_after:
            return "none"
        if silent >= self.patience.lost_after:
            self._is_open = False
            self._lose(now, SourceError(f"{self._name}: expected frames, none came for "
                                        f"{silent:.0f} s. Check the camera."))  # fmt: skip
            return "abandon"
        if self.state == "running":
            self._change("stalled")
        return "none"

    def next_tick(self, now: float) -> float | None:
        """Seconds until :meth:`tick` may have something to do; None if never."""
        if self.state == "ended" or (self._is_open and not self.is_live):
            return None
        if not self._is_open:
            return max(self._retry_at - now, 0.0)
        silent, patience = now - self._seen_at, self.patience
        stalls = silent < patience.stalled_after
        return max((patience.stalled_after if stalls else patience.lost_after) - silent, 0.0)

    def log_news(self) -> None:
        for level, text in self._news:
            _log.log(level, "%s: %s", self._name, text)
        self._news.clear()

    def _lose(self, at: float, error: ZssegError) -> None:
        self.error = error
        self._retry_at = at + self._retry_after * self._spread()
        self._retry_after = min(2.0 * self._retry_after, self.patience.longest_retry)
        self._change("lost")

    def _change(self, state: SourceState) -> None:
        if state == self.state:
            return
        before, self.state = self.state, state
        if state in ("stalled", "lost") or (state == "ended" and self.error):
            why = str(self.error or "").removeprefix(f"{self._name}: ")
            self._news.append((logging.WARNING, f"{state}: {why}" if why else state))
        else:
            level = logging.WARNING if before in ("stalled", "lost") else logging.INFO
            self._news.append((level, f"{state} again" if before == "lost" else state))
