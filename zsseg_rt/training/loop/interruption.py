"""Stop a run when the user or a scheduler asks for it, between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SECOND_INTERRUPT_SECONDS = 1.0


class StopRequest:
    """Whether a run was asked to stop, and how."""

    def __init__(self) -> None:
        self.reason = ""
        self._requested_at = 0.0

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return bool(self.reason)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C, at least a second later, stops at once."""
        elapsed = time.monotonic() - self._requested_at
        if self.requested:
            # A launcher repeats signals within milliseconds; only a person's second one counts.
            if number == signal.SIGINT and elapsed > _SECOND_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            return
        self.reason = signal.Signals(number).name
        self._requested_at = time.monotonic()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs.

    Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
