"""From sources to labels: the runner takes frames in turns, labels them and feeds the sinks."""

from __future__ import annotations

import bisect
import functools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zsseg_rt.common.process import OwnProcess
from zsseg_rt.common.recordings import Rotation
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
from zsseg_rt.runtime.frame_memory import FrameMemory
from zsseg_rt.runtime.lane_pool import InOrder, LanePool
from zsseg_rt.stream.follow import (
    Follow,
    Following,
    KeyFrames,
    NewestFrames,
    following_of,
    source_time,
)
from zsseg_rt.stream.gstreamer.pipelines import GstSource
from zsseg_rt.stream.hand_off import HandOff, Slot
from zsseg_rt.stream.sinks import Sink, SinkStats, SinkTarget, open_writers
from zsseg_rt.stream.source import Picture, Source
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.video import VideoSource
from zsseg_rt.stream.watch import Patience, SourceState, SourceWatch
from zsseg_rt.stream.writers import Writer, frame_of

Policy = Literal["latest", "all"]
POLICIES = ("latest", "all")

_Labels = InOrder[Frame, Segmentation] | NewestFrames | KeyFrames
_AGES = 1000  # frames that the statistics look back
# Seconds until a waiting stream looks around: a signal handler's stop() may come just before it
# waits, in the same thread, and wake nobody.
_LOOK = 0.3


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """How one source is doing."""

    state: SourceState  # "starting", "running", "stalled", "lost" or "ended"
    captured: int  # Frames that it has given
    labelled: int  # Frames of it that the network labelled, and whose labels were given out
    dropped: int  # Frames that were dropped before
    damaged: int  # Packets and frames that could not be decoded
    reconnects: int  # How often it came back after it was lost
    # Milliseconds from a frame's capture to its labels, {"p50", "p95", "p99"} over the last 1000
    # frames; empty before the first
    age_ms: Mapping[str, float]
    error: str | None = None  # What is wrong with it, or None
    reused: int = 0  # Labelled frames that got the labels of an earlier one
    fell_behind: int = 0  # How often it was opened anew since its frames came too late
    live: bool = True  # Whether it is a camera; the frames of a file have no age that matters
    # Labelled frames per second from its first result to its last; 0 before the second
    fps: float = 0.0
    given_out: int = 0  # Frames of it that were given out with labels, moved ones included
    given_out_fps: float = 0.0  # As fps, of those
    # As age_ms, from the capture of the frame that the network labelled
    labelled_age_ms: Mapping[str, float] = field(default_factory=dict)


# Seconds up to which ages are counted together.
AGE_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass
class Ages:
    """Ages of one source's results, in seconds."""

    total: float = 0.0  # Sum of all
    # Results per bound; the last holds those that are older than every bound
    counts: list[int] = field(default_factory=lambda: [0] * (len(AGE_BOUNDS) + 1))
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_AGES))

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.counts[bisect.bisect_left(AGE_BOUNDS, seconds)] += 1
        self.last.append(seconds)

    def percentiles(self) -> dict[str, float]:
        """Of the last ones, in milliseconds."""
        if not self.last:
            return {}
        values = np.percentile(np.array(self.last) * 1000.0, (50, 95, 99))
        return {f"p{p}": round(float(v), 3) for p, v in zip((50, 95, 99), values, strict=True)}


@dataclass
class Rate:
    """How many results of one source there were, and when, in seconds of ``time.monotonic()``."""

    count: int = 0
    began: float = 0.0  # When the first was there
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_AGES))

    def add(self, at: float) -> None:
        self.began = self.began if self.count else at
        self.last.append(at)
        self.count += 1

    def fps(self) -> float:
        """Results per second, from the first to the last."""
        took = self.last[-1] - self.began if self.last else 0.0
        return round((self.count - 1) / took, 3) if took > 0.0 else 0.0

    def of_late(self, seconds: float) -> float:
        """Results per second, over the last ``seconds``."""
        now, times = time.monotonic(), list(self.last)
        over = min(seconds, max(now - times[0], 1.0)) if times else 1.0
        return sum(at >= now - over for at in times) / over


@dataclass
class Tally:
    """The results of one source; other threads may read it."""

    given_out: Rate = field(default_factory=Rate)
    labelled: Rate = field(default_factory=Rate)
    ages: Ages = field(default_factory=Ages)
    labelled_ages: Ages = field(default_factory=Ages)  # Since the labelled frame was captured
    reused: int = 0
    newest: int = -1  # Frame that was labelled

    def add(self, seg: Segmentation) -> None:
        frame, now, since_labelled = frame_of(seg), time.monotonic(), seg.labelled_age or 0.0
        self.given_out.add(now)
        self.ages.add(since_labelled if seg.moved_from is None else now - frame.captured_at)
        self.labelled_ages.add(since_labelled)
        labelled = frame.index if seg.moved_from is None else seg.moved_from
        if labelled != self.newest:  # else its labels were moved before
            self.newest, self.reused = labelled, self.reused + seg.reused
            self.labelled.add(now)


class Stream:
    """An iterator of labelled frames; made by :meth:`zsseg_rt.Engine.stream`.

    Reading starts with the first frame that is asked for. Leave the stream with :meth:`close`, or
    use it as a context manager; one that is forgotten closes itself.

    Args:
        segment: Labels a frame in the iterating thread; with memories, ``memory`` and
            ``captured_at`` are given by name.
        writers: What each result is written with, in a thread of its own.
        memories: What each source's past frames left behind, by the source's name.
        following: How labels are carried on, with ``segment`` in another thread for ``latest``.
        version: The version of the vocabulary in force.
        lanes: Label several frames at the same time, for sources that wait and without memories;
            closed with the stream.
    """

    def __init__(  # noqa: PLR0913 - what a stream consists of, by name
        self,
        sources: Sequence[Source],
        segment: Callable[..., Segmentation],
        *,
        policy: Policy | None = None,
        max_staleness: float | None = None,
        writers: Sequence[Writer] = (),
        patience: Patience | None = None,
        memories: Mapping[str, FrameMemory] | None = None,
        following: Following | None = None,
        version: Callable[[], int | None] = lambda: None,
        lanes: LanePool | None = None,
    ) -> None:
        patience = patience or Patience()
        self._keeps_all = {
            one.name: policy == "all" or (policy is None and not one.live) for one in sources
        }
        self._hand_off = HandOff(self._keeps_all, max_staleness=max_staleness)
        self._captures = [
            Capture(source, slot, self._hand_off, patience)
            for source, slot in zip(sources, self._hand_off.slots, strict=True)
        ]
        self.tallies = {source.name: Tally() for source in sources}
        """The results of each source so far, by its name."""
        resumes = any(source.live for source in sources)
        self._sinks = [Sink(one, resumes=resumes) for one in writers]
        # Seconds that sources and sinks get to end by themselves.
        self._patience, self._process = [0.3, 10.0], OwnProcess(self)
        # A bound method of the stream would keep one that is forgotten.
        label = functools.partial(_label, segment if lanes is None else lanes.segment, memories)
        self._labels: _Labels
        if following is not None:
            self._labels = (
                KeyFrames(label, following)
                if following.every
                else NewestFrames(label, following, version)
            )
        elif lanes is None:
            self._labels = InOrder(label, 0)
        else:
            self._labels = InOrder(label, lanes.num_lanes, lanes.close)
        self._close = weakref.finalize(
            self, _close, self._hand_off, self._captures, self._sinks, self._patience,
            self._labels, self._process,
        )  # fmt: skip

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Segmentation:
        self._process.require()
        try:
            seg = None
            while seg is None:
                try:
                    seg = self._labels.next(self._next_frame)
                except _Refused as refused:
                    self._lose(refused)
        except (StopIteration, EndOfSource):
            self.close()
            raise StopIteration from None
        except ZssegError:
            self.close()
            raise
        source = frame_of(seg).source
        self.tallies[source].add(seg)
        for sink in self._sinks:
            sink.put(seg, waits=self._keeps_all[source])
        return seg

    def stop(self) -> None:
        """End the stream before its next frame; safe in any thread and in a signal handler.

        What waits in a sink longer than 0.5 s after that is not written.
        """
        self._patience[:] = 0.1, 5.5
        self._hand_off.close()
        for capture in self._captures:
            if (attempt := capture.attempt) is not None:
                attempt.stop()
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
        return {capture.name: self._stats_of(capture) for capture in self._captures}

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
        """The next frame; StopIteration at the end, or for key frames, of silent sources' names."""
        while not self._hand_off.is_closed:
            waits = [capture.tick() for capture in self._captures]
            self._refuse_if_none_works()
            for capture in self._captures:
                capture.watch.log_news()
            ended = all(capture.watch.state == "ended" for capture in self._captures)
            if ended and self._hand_off.is_empty:
                raise StopIteration
            frame = self._hand_off.take(min([_LOOK, *(w for w in waits if w is not None)]))
            if frame is not None:
                for capture in self._captures:
                    capture.look()
                return frame
            silent = [one.name for one in self._captures if one.watch.state != "running"]
            if silent and isinstance(self._labels, KeyFrames):
                raise StopIteration(*silent)
        raise EndOfSource("source: no more frames")

    def _lose(self, refused: _Refused) -> None:
        """Lose a source for one of its frames; the others go on."""
        (capture,) = (one for one in self._captures if one.name == refused.source)
        error = SourceError(f"{refused.source}: cannot be labelled: {refused.error}")
        capture.refuse(error)
        if all(not tally.given_out.count for tally in self.tallies.values()):
            capture.watch.ran = False  # the stream ends with this error if no source is better

    def _refuse_if_none_works(self) -> None:
        watches = [capture.watch for capture in self._captures]
        for watch in watches:
            if isinstance(watch.error, BackendUnavailableError):
                raise watch.error
        is_hopeless = all(w.error is not None and not (w.ran or w.is_awaited) for w in watches)
        if is_hopeless and (first := watches[0].error) is not None:
            raise first

    def _stats_of(self, capture: Capture) -> SourceStats:
        tally, watch = self.tallies[capture.name], capture.watch
        return SourceStats(
            state=watch.state,
            captured=capture.slot.captured,
            labelled=tally.labelled.count,
            dropped=capture.slot.dropped,
            damaged=capture.damaged,
            reconnects=watch.reconnects,
            age_ms=tally.ages.percentiles(),
            error=None if watch.error is None else str(watch.error),
            reused=tally.reused,
            fell_behind=capture.fell_behind,
            live=watch.is_live,
            fps=tally.labelled.fps(),
            given_out=tally.given_out.count,
            given_out_fps=tally.given_out.fps(),
            labelled_age_ms=tally.labelled_ages.percentiles(),
        )


class _Refused(Exception):  # noqa: N818 - it loses its source alone
    """A frame that the engine does not take, which is its source's fault alone."""

    def __init__(self, source: str, error: ZssegError) -> None:
        super().__init__(source)
        self.source, self.error = source, error


def _label(
    segment: Callable[..., Segmentation], memories: Mapping[str, FrameMemory] | None, frame: Frame
) -> Segmentation:
    """Label a frame, and note its age."""
    memory: dict[str, Any] = {}
    if memories is not None:
        memory = {"memory": memories[frame.source], "captured_at": source_time(frame)}
    try:
        on_gpu = None if memory else frame.on_gpu
        seg = segment(frame.image if on_gpu is None else on_gpu, **memory)
    except (ShapeError, DTypeError) as exc:
        raise _Refused(frame.source, exc) from exc
    return replace(seg, frame=frame, labelled_age=time.monotonic() - frame.captured_at)


def _close(
    hand_off: HandOff,
    captures: Sequence[Capture],
    sinks: Sequence[Sink],
    patience: Sequence[float],
    labels: _Labels,
    process: OwnProcess,
) -> None:
    if not process.is_here:
        return
    hand_off.close()
    attempts = [capture.attempt for capture in captures if capture.attempt is not None]
    for attempt in attempts:
        attempt.stop()
    labels.close()
    for sink in sinks:
        sink.finish()
    joins = [one.join for one in attempts], [one.join for one in sinks]
    for seconds, waits in zip(patience, joins, strict=True):
        last = time.monotonic() + seconds
        for wait in waits:
            wait(max(last - time.monotonic(), 0.0))


_LONGEST_GAP = 10.0  # seconds; times further apart were put together, and nobody waits for them


class _Attempt:
    """One thread that reads a source; one that hangs in a driver is abandoned, as a daemon."""

    def __init__(self, capture: Capture) -> None:
        self.is_over = False
        self.error: ZssegError | None = None
        self.frames = 0
        self.seen_at = 0.0  # when it gave the last of them
        self.late_since: float | None = None
        self._capture, self._stop = capture, threading.Event()
        name = f"read {capture.name}"
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)
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
        self._capture.damaged += 1

    def _read(self) -> None:
        # Any other error is printed by the thread, and the source must not look sound.
        capture = self._capture
        self.error = SourceError(f"{capture.name}: reading failed, see the traceback above")
        try:
            with closing(capture.source.pictures(self)) as pictures:
                for picture in pictures:
                    if not capture.offer(self, picture):
                        break
            self.error = None
        except ZssegError as exc:
            self.error = _without_frames(exc)
        finally:
            self.is_over = True
            capture.hand_off.nudge()


def _without_frames(error: ZssegError) -> ZssegError:
    """The error alone: the stack frames that it came through keep a decoder and its threads."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


class Capture:
    """Keeps one source going. All methods belong to the thread that takes frames."""

    def __init__(self, source: Source, slot: Slot, hand_off: HandOff, patience: Patience) -> None:
        self.watch = SourceWatch(source.name, live=source.live, patience=patience)
        self.name = source.name
        self.fell_behind = 0  # times that it was opened anew since its frames came late
        self.damaged = 0  # packets and frames that could not be decoded
        self.source, self.slot, self.hand_off = source, slot, hand_off
        self._paced = not (slot.keeps_all or source.live)
        self._start: float | None = None
        self._last_stamp = 0.0
        self.attempt: _Attempt | None = None
        self._frames = 0  # of this attempt that the watch knows of

    def tick(self) -> float | None:
        """Open the source or give it up where it is time; returns seconds until the next look."""
        self.look()
        now = time.monotonic()
        action = self.watch.tick(now)
        if action == "open":
            self.attempt, self._frames = _Attempt(self), 0
        elif action == "abandon":
            self._drop_attempt()
            self.hand_off.nudge()  # it may wait for room
        return self.watch.next_tick(now)

    def look(self) -> None:
        """Tell the watch what became of the source."""
        attempt = self.attempt
        if attempt is None:
            return
        is_over = attempt.is_over  # before its frames are looked at: the last one counts
        frames = attempt.frames
        if frames > self._frames:
            self._frames = frames
            self.watch.frame(attempt.seen_at)
        if frames and self.slot.keeps_all and self.slot.is_full:
            self.watch.frame(time.monotonic())  # it is we who are slow
        if is_over:
            self._drop_attempt()
            self.watch.over(time.monotonic(), attempt.error)

    def refuse(self, error: ZssegError) -> None:
        """Lose the source: a frame of it cannot be labelled. What it has waiting is dropped."""
        self._drop_attempt()
        self.hand_off.discard(self.slot)  # wakes the thread, which may wait for room
        self.watch.refuse(time.monotonic(), error)

    def _drop_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt.stop()
            self.attempt = None

    def offer(self, attempt: _Attempt, picture: Picture) -> bool:
        """Put a picture into the slot, in the reading thread."""
        if self._paced and self._is_stopped_before_its_time(attempt, picture):
            return False
        attempt.seen_at = time.monotonic()
        if self.source.live and not self.slot.keeps_all:
            self._refuse_if_late(attempt, picture)
        attempt.frames += 1
        return self.hand_off.put(self.slot, picture, lambda: not attempt.is_stopped)

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


_ON_GPUS = (GstSource, VideoSource)


@dataclass(frozen=True, kw_only=True)
class StreamParts:
    """The parts of a stream; nothing is read before it starts."""

    sources: Sequence[Source]
    policy: Policy | None = None
    max_staleness: float | None = None
    patience: Patience | None = None
    memories: Mapping[str, FrameMemory] | None = None
    following: Following | None = None
    writers: Sequence[Writer] = ()

    @classmethod
    def open(  # noqa: PLR0913 - what a stream is asked for, by name
        cls,
        source: str | Path | Sequence[str | Path],
        channel_order: str,
        *,
        policy: Policy | None = None,
        max_staleness: float | None = None,
        patience: Patience | None = None,
        sinks: Sequence[SinkTarget] = (),
        alpha: float = 0.5,
        legend: bool = False,
        rotation: Rotation | None = None,
        steady: bool = False,
        skip_still: bool = False,
        follow: Follow | None = False,
        every: int | None = None,
        loop: bool = False,
    ) -> StreamParts:
        """Read what is asked for; :meth:`zsseg_rt.Engine.stream` says what each means.

        ``follow`` None is on for cameras of which the newest frame counts; with ``loop``, video
        files begin again at their end.
        """
        if policy is not None and policy not in POLICIES:
            raise ArgumentError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        is_number = isinstance(max_staleness, (int, float))
        if max_staleness is not None and not (is_number and 0.0 < max_staleness < math.inf):
            raise ArgumentError(f"max_staleness: expected seconds above 0, got {max_staleness}")
        sources = open_sources(source, channel_order)
        if loop:
            sources = [
                replace(one, loops=True) if isinstance(one, VideoSource) and not one.live else one
                for one in sources
            ]
        names = [one.name for one in sources]
        memories = None
        if steady or skip_still:
            memories = {name: FrameMemory(steady=steady, skip_still=skip_still) for name in names}
        return cls(
            sources=sources,
            policy=policy,
            max_staleness=max_staleness,
            patience=patience,
            memories=memories,
            following=following_of(follow, every, policy, sources, channel_order),
            writers=open_writers(
                sinks,
                channel_order=channel_order,
                alpha=alpha,
                legend=legend,
                sources=names,
                rotation=rotation,
            ),
        )

    @property
    def takes_lanes(self) -> bool:
        """Whether several frames can be labelled at the same time: no source is a camera."""
        waits = self.policy != "latest" and not any(one.live for one in self.sources)
        return waits and self.memories is None and self.following is None

    def start(
        self,
        segment: Callable[..., Segmentation],
        open_lanes: Callable[[], LanePool] | None,
        device: str = "cpu",
        version: Callable[[], int | None] = lambda: None,
    ) -> Stream:
        """The stream; ``device`` is where ``segment`` also takes frames."""
        try:
            lanes = open_lanes() if open_lanes is not None and self.takes_lanes else None
        except BaseException:
            for writer in self.writers:
                writer.close()
            raise
        parts = vars(self)
        if not self.memories:
            parts = parts | {"sources": on_device(self.sources, device)}
        return Stream(segment=segment, version=version, lanes=lanes, **parts)


def on_device(sources: Sequence[Source], device: str) -> list[Source]:
    """The sources, of which those that can hand over frames in a GPU's memory do so."""
    return [replace(one, device=device) if isinstance(one, _ON_GPUS) else one for one in sources]
