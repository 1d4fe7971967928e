"""Failures that this tool must find; tried only by name, to see that it does."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tools.torture.damage import odd_text
from tools.torture.target import Attempt, RefusedError, target


@target("itself", "failures made on purpose: one of each kind in ten cases", group="itself",
        by_default=False)  # fmt: skip
def _itself(_: Path) -> Attempt:
    kept: list[bytearray] = []

    def attempt(draw: random.Random) -> None:
        case = _number(Path("count"))
        if case % 10 == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif case % 10 == 4:
            time.sleep(3600)
        elif case % 10 == 6:
            raise KeyError(odd_text(draw)[:50])
        elif case % 10 == 8:
            kept.append(bytearray(os.urandom(1)) * (1200 << 20))
            kept.clear()
        elif case % 2:
            raise RefusedError("as it should be")

    return attempt


def _number(path: Path) -> int:
    """How often this was called, in this process and those before it."""
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    return count
