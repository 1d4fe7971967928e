"""Labels for frames that the network does not label: motion carries those of others to them."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from zsseg_rt import ops
from zsseg_rt.common.arrays import gpu_index
from zsseg_rt.errors import ArgumentError
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.frame_memory import Glance, LabelMover, Way, follow_size
from zsseg_rt.runtime.frames import planes_of
from zsseg_rt.stream.photo_folder import PhotoSource
from zsseg_rt.stream.source import Source

Follow = bool | Literal["hold"]

MOST_EVERY = 64  # frames from one that is labelled to the next: half of them wait in memory
_LONGEST_STEP = 1.0  # seconds; neighbours further apart do not follow each other
_stream_on = cache(core.Stream)  # a GPU, by its number
_KEEPS_UP = 0.9  # of the time between frames: a network that takes less labels each of them

_Label = Callable[[Frame], Segmentation]


@dataclass(frozen=True, kw_only=True)
class Following:
    """How labels are carried on."""

    holds: bool = False  # Whether places where motion fails keep their last label
    # Every so many frames one is labelled; None labels the newest whenever the network is free
    every: int | None = None
    channel_order: str = "rgb"  # Of the frames


def following_of(
    follow: Any, every: Any, policy: str | None, sources: Sequence[Source], channel_order: str
) -> Following | None:
    """How labels are carried; None if they are not. ``follow`` None does so for cameras only."""
    is_live = all(one.live for one in sources)
    takes_all = policy == "all" or (policy is None and not is_live)
    follow = follow if follow is not None else is_live and not takes_all
    photos = [one.name for one in sources if isinstance(one, PhotoSource)]
    words = (True, False, "hold")
    is_count = type(every) is int and 2 <= every <= MOST_EVERY
    refusals = {
        f"follow: expected True, False or 'hold', got {follow!r}": follow not in words,
        f"every: expected a whole number from 2 to {MOST_EVERY}, got {every!r}. To label every "
        "frame, leave it and follow out.": not (every is None or is_count),
        "every: expected none without follow, got one. Add follow.": every and not follow,
        f"follow: expected a camera or video, got the photos {', '.join(photos[:1])}, which do not "
        "follow each other. Leave it out.": follow and photos,
        "follow: policy all labels every frame, so none is left to carry labels to. Add every=K "
        "(--every K), or take policy latest.": follow and takes_all and every is None,
        "every: policy latest labels as many frames as the network can. Take policy all, or leave "
        "every out.": every and not takes_all,
    }  # fmt: skip
    for text, applies in refusals.items():
        if applies:
            raise ArgumentError(text)
    if not follow:
        return None
    return Following(holds=follow == "hold", every=every, channel_order=channel_order)


def source_time(frame: Frame) -> float:
    """When a frame was taken: a file's are read faster, so its own time stamps count."""
    own = frame.pts_seconds if frame.clock == "file" else None
    return frame.captured_at if own is None else own


def period_of(before: Frame | None, now: Frame) -> float | None:
    """Seconds per frame since another one; None where labels of that are of no use."""
    if before is None or _size_of(before) != _size_of(now):
        return None
    period = (source_time(now) - source_time(before)) / max(now.index - before.index, 1)
    return period if 0.0 <= period <= _LONGEST_STEP else None


def _size_of(frame: Frame) -> tuple[int, int]:
    on_gpu = frame.on_gpu  # another thread may let it leave
    height, width = (frame.image if on_gpu is None else on_gpu).shape[:2]
    return int(height), int(width)


def look(frame: Frame, channel_order: str) -> Glance:
    """The small picture of a frame, made where it lies."""
    on_gpu, size_hw = frame.on_gpu, follow_size(_size_of(frame))
    if on_gpu is None:
        return Glance.at(frame.image, channel_order, size_hw)
    image, matrix = planes_of(on_gpu)
    stream = _stream_on(gpu_index(on_gpu.device)).handle
    settings = {"channel_order": "rgb" if matrix else channel_order, "stream": stream, **matrix}
    twice = (2 * size_hw[0], 2 * size_hw[1])
    mean, std = (0.0, 0.0, 0.0), (1 / 255,) * 3
    small = core.outside_captures(
        lambda: ops.preprocess(image, size_hw=twice, mean=mean, std=std, **settings).numpy(stream)
    )
    rows = np.rint(small.transpose(1, 2, 0)).astype(np.uint8, order="C")
    return Glance.at(rows, "rgb", size_hw)


@dataclass
class _Track:
    """One source: its newest frame, and the labels that are carried to it."""

    mover: LabelMover
    frame: Frame | None = None
    glance: Any = None  # of the newest frame that the way leads to
    seg: Segmentation | None = None  # what is carried; callers get copies of its labels
    way: Any = None  # back to it
    period: float = 0.0  # seconds between the source's frames
    position: int = 0  # of the newest frame behind the last that was labelled, for key frames
    waiting: list[tuple[Frame, Glance]] = field(default_factory=list)

    def go_on(self, glance: Glance, *ways: Way) -> None:
        """Lead the way, and others, on to the next frame."""
        self.mover.extend(self.glance, glance, *ways, *([self.way] if self.seg else []))
        self.glance = glance

    def result(self, frame: Frame) -> Segmentation:
        """The result of the frame that the way leads to."""
        start, seg = time.perf_counter(), self.seg
        assert seg is not None and seg.frame is not None  # noqa: PT018
        if seg.frame is frame:
            return replace(seg, labels=seg.labels.copy())
        labels = self.mover.move(seg.labels, self.way, self.glance)
        took = 1e3 * (time.perf_counter() - start)
        return replace(
            seg,
            labels=labels,
            scores=None,
            class_scores=None,
            frame=frame,
            moved_from=seg.frame.index,
            labelled_age=time.monotonic() - seg.frame.captured_at,
            times={"move": took, "total": took},
        )


class NewestFrames:
    """Gives every frame labels, while the network labels the newest whenever it is free."""

    def __init__(
        self,
        label: _Label,
        settings: Following,
        version: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._label, self._settings, self._version = label, settings, version
        self._tracks: dict[str, _Track] = {}
        self._thread = ThreadPoolExecutor(1, "label")
        # The frame under way, then the newest: whose it is, the way back to it, and its labels
        self._jobs = deque[tuple[_Track, Way, Future[Segmentation]]]()
        self._took = 0.0

    def next(self, next_frame: Callable[[], Frame]) -> Segmentation:
        """The next frame's result; the first of a source, and of new classes, is waited for."""
        frame = next_frame()
        track, glance = self._tracks.get(frame.source), look(frame, self._settings.channel_order)
        if self._jobs and self._jobs[-1][2].cancel():  # the network has not come to it
            self._jobs.pop()
        while self._jobs and self._jobs[0][2].done():
            self._finish()
        period = None if track is None else period_of(track.frame, frame)
        if track is None or period is None:  # labels under way of a track before are of no use
            mover = LabelMover(holds=self._settings.holds)
            track = self._tracks[frame.source] = _Track(mover, frame, glance)
        else:
            track.frame, track.period = frame, period or track.period
            track.go_on(glance, *(way for whose, way, _ in self._jobs if whose is track))
        self._offer(track, frame)
        rate = sum(1.0 / one.period for one in self._tracks.values() if one.period)
        if len(self._jobs) == 1 and 0.0 < self._took * rate < _KEEPS_UP:
            self._finish()
        while (seg := track.seg) is None or self._version() not in (None, seg.vocabulary_version):
            if not self._jobs:
                self._offer(track, frame)
            self._finish()
        return track.result(frame)

    def close(self) -> None:
        """Finish what is being labelled."""
        self._thread.shutdown(cancel_futures=True)

    def _offer(self, track: _Track, frame: Frame) -> None:
        job = self._thread.submit(self._label, frame)
        self._jobs.append((track, Way.begin(track.glance), job))

    def _finish(self) -> None:
        """Wait for the labels of the frame under way, which are carried on from then."""
        track, way, job = self._jobs.popleft()
        track.seg, track.way = job.result(), way
        self._took = track.seg.times.get("total", 0.0) / 1e3


class KeyFrames:
    """Labels one of ``every`` frames; the others take those of the nearer one, moved."""

    def __init__(self, label: _Label, settings: Following) -> None:
        self._label, self._settings, self._every = label, settings, settings.every or 1
        self._tracks = defaultdict[str, _Track](lambda: _Track(LabelMover(holds=settings.holds)))
        self._ready: deque[Segmentation] = deque()

    def next(self, next_frame: Callable[[], Frame]) -> Segmentation:
        """The next frame's result; StopIteration where every one was given.

        Frames that wait for the next labelled one do so until ``next_frame`` raises StopIteration,
        with the names of silent sources if it may be called again.
        """
        while not self._ready:
            try:
                self._take(next_frame())
            except StopIteration as end:
                for source in end.args or list(self._tracks):
                    self._release(self._tracks[source])
                if not (self._ready or end.args):
                    raise
        return self._ready.popleft()

    def close(self) -> None:
        """Nothing is under way."""

    def _take(self, frame: Frame) -> None:
        track, glance = self._tracks[frame.source], look(frame, self._settings.channel_order)
        goes_on = period_of(track.frame, frame) is not None
        position = (track.position + 1) % self._every if goes_on else 0
        seg = None if position else self._label(frame)  # one that is refused changes nothing
        track.frame, track.position = frame, position
        if seg is None:
            track.waiting.append((frame, glance))
            if 2 * position <= self._every:
                self._release(track)
            return
        back = replace(track, glance=glance, seg=seg, way=Way.begin(glance))
        led_back = deque[Segmentation]()
        while goes_on and track.waiting:  # up to a scene cut
            back.go_on(track.waiting[-1][1])
            if back.way.flow is None:
                break
            led_back.appendleft(back.result(track.waiting.pop()[0]))
        self._release(track)
        track.glance, track.seg, track.way = glance, seg, Way.begin(glance)
        self._ready += [*led_back, track.result(frame)]

    def _release(self, track: _Track) -> None:
        """Carry the last labels on to the frames that wait."""
        for frame, glance in track.waiting:
            track.go_on(glance)
            self._ready.append(track.result(frame))
        track.waiting.clear()
