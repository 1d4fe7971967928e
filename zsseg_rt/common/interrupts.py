"""Ctrl-C at moments that must not be torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP that have handlers in Python wait for the block's end.

    Handlers run in the main thread alone: in others there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {k: signal.getsignal(k) for k in _KINDS}
    held = {kind: handler for kind, handler in before.items() if callable(handler)}
    for kind in held:
        signal.signal(kind, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for kind, handler in held.items():
            signal.signal(kind, handler)
        for number in came[:1]:
            signal.raise_signal(number)
