"""From sources to labels: the runner takes frames in turns, labels them and feeds the sinks."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zsseg_rt.common.process import OwnProcess
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    DTypeError,
    EndOfSource,
    ShapeError,
    SourceError,
    ZssegError,
)
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.lane_pool import LanePool
from zsseg_rt.stream.ahead import Ahead
from zsseg_rt.stream.capture import Capture
from zsseg_rt.stream.hand_off import HandOff, SlotSettings
from zsseg_rt.stream.sinks import Sink, SinkStats, Writer
from zsseg_rt.stream.source import FramePathName, Source
from zsseg_rt.stream.watch import Patience, SourceState, SourceWatch
from zsseg_rt.stream.writers import frame_of

if TYPE_CHECKING:
    from zsseg_rt.runtime.steady.memory import FrameMemory

Policy = Literal["latest", "all"]
POLICIES = ("latest", "all")

_AGES = 1000  # frames that the statistics look back
# Seconds until a waiting stream looks around: a signal handler's stop() may come just before it
# waits, in the same thread, and wake nobody.
_LOOK = 0.3


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """How one source is doing.

    Attributes:
        state: ``"starting"``, ``"running"``, ``"stalled"``, ``"lost"`` or ``"ended"``.
        captured: Frames that it has given.
        labelled: Frames of it that were labelled.
        dropped: Frames that were dropped before.
        damaged: Packets and frames that could not be decoded.
        reconnects: How often it came back after it was lost.
        age_ms: Milliseconds from capture to labels, ``{"p50", "p95", "p99"}`` over the last 1000
            frames; empty before the first.
        error: What is wrong with it, or None.
        reused: Labelled frames that got the labels of an earlier one.
        fell_behind: How often it was opened anew since its frames came too late.
        live: Whether it is a camera; the frames of a file have no age that matters.
        fps: Labelled frames per second from its first result to its last; 0 before the second.
        path: How its newest frame came: ``"host"``, or without the CPU, ``"nvmm"`` or ``"cuda"``.
    """

    state: SourceState
    captured: int
    labelled: int
    dropped: int
    damaged: int
    reconnects: int
    age_ms: Mapping[str, float]
    error: str | None = None
    reused: int = 0
    fell_behind: int = 0
    live: bool = True
    fps: float = 0.0
    path: FramePathName = "host"


@dataclass
class _Ages:
    count: int = 0
    reused: int = 0
    began: float = 0.0  # when its first result was there
    seen: float = 0.0  # and its last
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_AGES))

    def add(self, seconds: float, *, reused: bool) -> None:
        self.seen = time.monotonic()
        self.began = self.began if self.count else self.seen
        self.count += 1
        self.reused += reused
        self.last.append(seconds)

    @property
    def fps(self) -> float:
        took = self.seen - self.began
        return round((self.count - 1) / took, 3) if took > 0.0 else 0.0

    def percentiles(self) -> dict[str, float]:
        if not self.last:
            return {}
        values = np.percentile(np.array(self.last) * 1000.0, (50, 95, 99))
        return {f"p{p}": round(float(v), 3) for p, v in zip((50, 95, 99), values, strict=True)}


class Stream:
    """An iterator of labelled frames; made by :meth:`zsseg_rt.Engine.stream`.

    Reading starts with the first frame that is asked for. Leave the stream with :meth:`close`, or
    use it as a context manager; one that is forgotten closes itself.

    Args:
        sources: Where frames come from; several take turns.
        segment: Labels a frame, uint8 [H, W, 3]. It is called in the iterating thread; with
            ``memories``, ``memory`` and ``captured_at`` are given by name.
        policy: ``"latest"`` labels the newest frame and drops older ones; ``"all"`` labels every
            frame, and the source waits. None takes ``latest`` for cameras, ``all`` for the rest.
        max_staleness: Seconds after which a frame that still waits is dropped; None keeps it.
        writers: What each result is written with, in a thread of its own. A writer that is too slow
            misses frames where the source cannot wait.
        patience: How long cameras are waited for.
        memories: What each source's past frames left behind, by the source's name; None if frames
            are labelled one by one.
        lanes: Label several frames at the same time in place of ``segment``, for sources that wait
            and without memories; closed with the stream.

    Raises:
        ArgumentError: A setting is outside its range.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        segment: Callable[..., Segmentation],
        *,
        policy: Policy | None = None,
        max_staleness: float | None = None,
        writers: Sequence[Writer] = (),
        patience: Patience | None = None,
        memories: Mapping[str, FrameMemory] | None = None,
        lanes: LanePool | None = None,
    ) -> None:
        check_settings(policy, max_staleness)
        self._segment = segment if lanes is None else lanes.segment
        keeps_all = [policy == "all" or (policy is None and not s.live) for s in sources]
        self._hand_off = HandOff(
            [
                SlotSettings(source=source.name, keeps_all=keeps)
                for source, keeps in zip(sources, keeps_all, strict=True)
            ],
            max_staleness=max_staleness,
        )
        self._captures = [
            Capture(
                source,
                slot,
                self._hand_off,
                SourceWatch(source.name, live=source.live, patience=patience or Patience()),
                paced=not (keeps_all[slot] or source.live),
            )
            for slot, source in enumerate(sources)
        ]
        self._ages = {source.name: _Ages() for source in sources}
        self._keeps_all = dict(zip(self._ages, keeps_all, strict=True))
        resumes = any(source.live for source in sources)
        self._sinks = [Sink(one, resumes=resumes, num_sources=len(sources)) for one in writers]
        self._patience, self._process = _EndPatience(), OwnProcess(self)
        # A bound method would keep a stream that is forgotten.
        label = functools.partial(_label, self._segment, memories)
        self._label = label
        self._ahead = None if lanes is None else Ahead(label, lanes, self._hand_off)
        self._close = weakref.finalize(
            self, _close, self._hand_off, self._captures, self._sinks, self._patience, self._ahead,
            self._process,
        )  # fmt: skip

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Segmentation:
        """Label the next frame.

        Raises:
            SourceError: No source has ever given a frame, and each has failed.
            BackendUnavailableError: A package that a source needs is not installed.
            EngineStateError: The stream was made before this process was forked.
        """
        self._process.require()
        try:
            while isinstance(labelled := self._next_labelled(), _Refused):
                self._lose(labelled)
            seg, age = labelled
        except EndOfSource:
            self.close()
            raise StopIteration from None
        except ZssegError:
            self.close()
            raise
        frame = frame_of(seg)
        self._ages[frame.source].add(age, reused=seg.reused)
        for sink in self._sinks:
            sink.put(seg, waits=self._keeps_all[frame.source])
        return seg

    def stop(self) -> None:
        """End the stream before its next frame; safe in any thread and in a signal handler.

        What waits in a sink longer than 0.5 s after that is not written.
        """
        self._patience.source, self._patience.sinks, self._patience.files = 0.1, 0.5, 5.0
        self._hand_off.close()
        for capture in self._captures:
            capture.stop()
        for sink in self._sinks:
            sink.hurry()

    def close(self) -> None:
        """Stop reading, write what waits in the sinks, and finish their files.

        Threads that hang are left behind: in a source after 0.3 s, in a sink after 10 s, which is
        an error of the sink.
        """
        self._close()

    def stats(self) -> dict[str, SourceStats]:
        """How each source is doing, by its name."""
        return {
            capture.name: self._stats_of(slot, capture)
            for slot, capture in enumerate(self._captures)
        }

    @property
    def has_lost_its_sinks(self) -> bool:
        """Whether there were sinks, and each has failed for good."""
        return bool(self._sinks) and all(sink.has_failed for sink in self._sinks)

    def sink_stats(self) -> list[SinkStats]:
        """How each sink is doing, in the order in which they were given."""
        return [sink.stats() for sink in self._sinks]

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_frame(self) -> Frame:
        """See to the sources until one has a frame."""
        while not self._hand_off.is_closed:
            waits = [capture.tick() for capture in self._captures]
            self._refuse_if_none_works()
            for capture in self._captures:
                capture.watch.log_news()
            if self._is_exhausted():
                break
            frame = self._hand_off.take(min([_LOOK, *(w for w in waits if w is not None)]))
            if frame is not None:
                for capture in self._captures:
                    capture.look()
                return frame
        raise EndOfSource("source: no more frames")

    def _next_labelled(self) -> _Labelled:
        """The next result, and its age when the labels were there."""
        if self._ahead is None:
            return self._label(self._next_frame())
        return self._ahead.next(self._next_frame)

    def _lose(self, refused: _Refused) -> None:
        """Lose a source for one of its frames; the others go on."""
        name = refused.source
        (capture,) = (capture for capture in self._captures if capture.name == name)
        error = SourceError(f"{name}: cannot be labelled: {refused.error}")
        capture.refuse(error)
        if all(not ages.count for ages in self._ages.values()):
            capture.watch.ran = False  # the stream ends with this error if no source is better

    def _is_exhausted(self) -> bool:
        ended = all(capture.watch.state == "ended" for capture in self._captures)
        return ended and self._hand_off.is_empty

    def _refuse_if_none_works(self) -> None:
        watches = [capture.watch for capture in self._captures]
        for watch in watches:
            if isinstance(watch.error, BackendUnavailableError):
                raise watch.error
        first = watches[0].error
        if any(watch.is_awaited for watch in watches):
            return
        if first is not None and all(w.error is not None and not w.ran for w in watches):
            raise first

    def _stats_of(self, slot: int, capture: Capture) -> SourceStats:
        given, dropped = self._hand_off.counts(slot)
        ages, watch = self._ages[capture.name], capture.watch
        return SourceStats(
            state=watch.state,
            captured=given,
            labelled=ages.count,
            dropped=dropped,
            damaged=capture.damaged,
            reconnects=watch.reconnects,
            age_ms=ages.percentiles(),
            error=None if watch.error is None else str(watch.error),
            reused=ages.reused,
            fell_behind=capture.fell_behind,
            live=watch.is_live,
            fps=ages.fps,
            path=capture.path,
        )


@dataclass(frozen=True)
class _Refused:
    """A frame that the engine does not take, which is its source's fault alone."""

    source: str
    error: ZssegError


_Labelled = tuple[Segmentation, float] | _Refused


@dataclass(kw_only=True)
class _EndPatience:
    """Seconds that all threads of a kind get to end by themselves."""

    source: float = 0.3
    sinks: float = 10.0
    files: float = 0.0  # to be finished, after the frames that waited were dropped


def _label(
    segment: Callable[..., Segmentation], memories: Mapping[str, FrameMemory] | None, frame: Frame
) -> _Labelled:
    """Label a frame; returns the result and its age in seconds."""
    given: dict[str, Any] = {}
    if memories is not None:
        # A file's frames are read faster than they were taken: its own time stamps count.
        own_time = frame.pts_seconds if frame.clock == "file" else None
        captured_at = frame.captured_at if own_time is None else own_time
        given = {"memory": memories[frame.source], "captured_at": captured_at}
    try:
        on_gpu = None if given else frame.on_gpu
        seg = segment(frame.image if on_gpu is None else on_gpu, **given)
    except (ShapeError, DTypeError) as exc:
        return _Refused(frame.source, exc)
    return replace(seg, frame=frame), time.monotonic() - frame.captured_at


def _close(
    hand_off: HandOff,
    captures: Sequence[Capture],
    sinks: Sequence[Sink],
    patience: _EndPatience,
    ahead: Ahead[Any] | None,
    process: OwnProcess,
) -> None:
    if not process.is_here:
        return
    hand_off.close()
    for capture in captures:
        capture.stop()
    if ahead is not None:
        ahead.close()
    for sink in sinks:
        sink.finish()
    _share(patience.source, [capture.join for capture in captures])
    _share(patience.sinks, [sink.wait for sink in sinks])
    _share(patience.files, [sink.join for sink in sinks])


def _share(seconds: float, waits: Sequence[Callable[[float], None]]) -> None:
    """Wait for several, so long in all."""
    last = time.monotonic() + seconds
    for wait in waits:
        wait(max(last - time.monotonic(), 0.0))


def waits_for_labels(sources: Sequence[Source], policy: Policy | None) -> bool:
    """Whether no source minds a result that is handed out a little later: none is a camera."""
    return policy != "latest" and not any(source.live for source in sources)


def check_settings(policy: Any, max_staleness: Any) -> None:
    """Refuse settings of a stream that are outside their range."""
    if policy is not None and policy not in POLICIES:
        raise ArgumentError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if max_staleness is not None and not (
        isinstance(max_staleness, (int, float)) and 0.0 < max_staleness < math.inf
    ):
        raise ArgumentError(f"max_staleness: expected seconds above 0, got {max_staleness}")
