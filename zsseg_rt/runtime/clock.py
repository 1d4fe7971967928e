"""Time the stages of a frame, and show them to NVIDIA's tools."""

from __future__ import annotations

import itertools
import time
from typing import Any

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.ops import core

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
    "candidates",
    "upsample_argmax",
    "results",
)
"""Every stage that a family may have, in the order a frame passes them."""


class NvtxRanges:
    """Pushes an NVTX range for each frame and, in it, for each stage; Nsight Systems shows them.

    A range needs its name when it begins, and a clock tells stages when they end: a stage is called
    by what followed the one before it in the last frame. A lane's first frame has no stages.
    """

    def __init__(self) -> None:
        with needs_extra("nvtx", "to show ranges"):
            import nvtx
        self._nvtx: Any = nvtx
        self._following: dict[str, str] = {}
        self._last, self._open = "", 0

    def begin_frame(self) -> None:
        """Begin a frame, and its first stage."""
        self.end_frame()
        self._last = "start"
        self._push("frame", self._following.get("start"))

    def end_stage(self, stage: str) -> None:
        """End a stage, and begin the next one."""
        self._following[self._last], self._last = stage, stage
        self._pop(to=1)
        self._push(self._following.get(stage))

    def end_frame(self) -> None:
        """End the frame and what is open in it; of the thread that began it."""
        self._pop(to=0)

    def _push(self, *names: str | None) -> None:
        for name in filter(None, names):
            self._nvtx.push_range(message=name, domain="zsseg_rt")
            self._open += 1

    def _pop(self, *, to: int) -> None:
        while self._open > to:
            self._nvtx.pop_range(domain="zsseg_rt")
            self._open -= 1


class StageClock:
    """Times one lane's frames, one at a time: :meth:`start`, then :meth:`mark` after each stage.

    On CUDA the marks are events on the stream, made once, so that timing does not make the host
    wait; captures hold them as nodes.
    """

    def __init__(
        self,
        stream: Any | None = None,
        *,
        enabled: bool | None = True,
        ranges: NvtxRanges | None = None,
    ) -> None:
        self._stream, self._ranges = stream, ranges
        # None times on CUDA the whole frame alone, by the host's clock
        self._whole_only = enabled is None and stream is not None
        self._enabled = enabled is not False and not self._whole_only
        self._began = 0.0
        self._events: dict[str, Any] = {}
        if self._enabled and stream is not None:
            self._events = {stage: core.Event(stream.device) for stage in ("start", *STAGES)}
        self.marks: list[tuple[str, Any]] = []
        """The marks since :meth:`start`; a replayed capture adds what it recorded."""
        self.is_muted = False
        """Whether marks count for nothing: a stage that is passed repeatedly has one event."""

    def start(self) -> None:
        """Begin a frame."""
        self.marks.clear()
        self.is_muted = False
        if self._ranges is not None:
            self._ranges.begin_frame()
        self._began = time.perf_counter()
        self._note("start")

    def mark(self, stage: str) -> None:
        """End a stage, one of :data:`STAGES`, that began at the previous mark."""
        if self.is_muted:
            return
        if self._ranges is not None:
            self._ranges.end_stage(stage)
        self._note(stage)

    def stop(self) -> None:
        """End the frame, also one that failed. Calling it twice is harmless."""
        if self._ranges is not None:
            self._ranges.end_frame()

    def _note(self, stage: str) -> None:
        if not self._enabled:
            return
        if self._stream is None:
            self.marks.append((stage, time.perf_counter()))
            return
        event = self._events[stage]
        event.record(self._stream.handle)
        self.marks.append((stage, event))

    def times(self) -> dict[str, float]:
        """Milliseconds per stage and ``"total"``; on CUDA the stream must have been waited for."""
        if self._whole_only:
            return {"total": (time.perf_counter() - self._began) * 1000.0}
        if not self._enabled:
            return {}
        marks = self.marks
        stages: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(marks):  # windows pass some repeatedly
            stages[name] = stages.get(name, 0.0) + self._between(before, after)
        return stages | {"total": self._between(marks[0][1], marks[-1][1])}

    def _between(self, before: Any, after: Any) -> float:
        if self._stream is None:
            return float((after - before) * 1000.0)
        return float(before.elapsed_ms(after))
