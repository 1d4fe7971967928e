"""Signals, and news for systemd: for commands that run until they are stopped."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_EVERY = 1.0  # seconds
_log = logging.getLogger(__name__)


class Notifier:
    """Sends systemd ``READY=1`` with the first frame, then ``WATCHDOG=1`` once a second."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        path = variables.get("NOTIFY_SOCKET", "")
        self._path = "\0" + path[1:] if path.startswith("@") else path
        self._last: float | None = None

    def frame(self) -> None:
        """A frame was labelled."""
        now = time.monotonic()
        if not self._path or (self._last is not None and now - self._last < _EVERY):
            return
        news = "WATCHDOG=1" if self._last is not None else "READY=1"
        self._last = now
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.sendto(news.encode(), self._path)
        except OSError as exc:
            _log.warning("NOTIFY_SOCKET: cannot report frames to systemd: %s", exc.strerror)
            self._path = ""


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function at SIGINT, SIGTERM or SIGHUP (unless ignored); a second one acts as usual."""
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop()

    if threading.current_thread() is threading.main_thread():
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            kinds.append(signal.SIGHUP)
        for kind in kinds:
            before[kind] = signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
