"""Time the stages of a frame."""

from __future__ import annotations

import itertools
import time
from typing import Any

from zsseg_rt import _C

__all__ = ["STAGES", "StageClock"]

STAGES = (
    "compare",
    "preprocess",
    "image_encoder",
    "descriptor",
    "decoder",
    "similarity",
    "regions",
    "check",
    "steady",
    "upsample_argmax",
    "results",
)
"""Every stage that a family may have, in the order a frame passes them."""


class StageClock:
    """Times one lane's frames, one at a time: :meth:`start`, then :meth:`mark` after each stage.

    On CUDA the marks are events on the stream, made once, so that timing does not make the host
    wait.

    Args:
        stream: The lane's CUDA stream; None on the CPU.
        enabled: False marks nothing and gives no times.
    """

    def __init__(self, stream: Any | None = None, *, enabled: bool = True) -> None:
        self._stream = stream
        self._enabled = enabled
        self._events: dict[str, Any] = {}
        if enabled and stream is not None:
            self._events = {stage: _C.Event(stream.device) for stage in ("start", *STAGES)}
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a frame."""
        self._marks.clear()
        self.mark("start")

    def mark(self, stage: str) -> None:
        """End a stage, one of :data:`STAGES`, that began at the previous mark."""
        if not self._enabled:
            return
        if self._stream is None:
            self._marks.append((stage, time.perf_counter()))
            return
        event = self._events[stage]
        event.record(self._stream.handle)
        self._marks.append((stage, event))

    def times(self) -> dict[str, float]:
        """Milliseconds per stage and ``"total"``; on CUDA the stream must have been waited for."""
        if not self._enabled:
            return {}
        marks = self._marks
        pairs = itertools.pairwise(marks)
        stages = {name: self._between(before, after) for (_, before), (name, after) in pairs}
        return stages | {"total": self._between(marks[0][1], marks[-1][1])}

    def _between(self, before: Any, after: Any) -> float:
        if self._stream is None:
            return float((after - before) * 1000.0)
        return float(before.elapsed_ms(after))
