"""Opened by a candidate's own process: a rival that keeps its last result and its peak memory."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rivals.after import Labelling, Painting
from rivals.frames import EngineRival, GraphRival, TorchRival

_KINDS = {
    "engine": EngineRival,
    "torch": TorchRival,
    "graphs": GraphRival,
    "labels": Labelling,
    "overlay": Painting,
}


class Held:
    """A rival, its last result, and a peak of memory that starts anew with every selection."""

    def __init__(self, rival: Any) -> None:
        self._rival, self._last = rival, None
        self.described = rival.described

    def __call__(self) -> Any:
        """Make one call."""
        self._last = self._rival()
        return self._last

    def select(self, classes: int, out_hw: list[int]) -> None:
        """Change the number of classes and the size of the result."""
        self._last = None
        self._rival.select(classes, tuple(out_hw))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def labels(self, _: int) -> Any:
        """The last result."""
        return self._last


def open_rival(kind: str, classes: int, out_hw: list[int], arguments: dict[str, Any]) -> Held:
    """Load a rival; see the classes in ``frames.py`` and ``after.py`` for their arguments."""
    rival = Held(_KINDS[kind](**arguments))
    rival.select(classes, out_hw)
    return rival
