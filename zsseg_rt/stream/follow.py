"""Labels for frames that the network does not label: motion carries those of others to them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.frame_memory import Glance, LabelMover, Way, follow_size
from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.runtime.lane_pool import InOrder
from zsseg_rt.stream.photo_folder import PhotoSource
from zsseg_rt.stream.source import Source

Follow = bool | Literal["hold"]

MOST_EVERY = 64
"""Frames from one that is labelled to the next, at most: half of them wait in memory."""
_LONGEST_STEP = 1.0  # seconds; neighbours further apart do not follow each other
ONE_BY_ONE = partial(InOrder, num_threads=0)
_KEEPS_UP = 0.9  # of the time between frames: a network that takes less labels each of them

_Label = Callable[[Frame], Segmentation]
# A frame, or the source that sends none for now; how many lie between the frame and the labelled
# one before, 0 for one that is labelled itself; and whether it follows the frame before
_Turn = tuple[Frame | str, int, bool]


@dataclass(frozen=True, kw_only=True)
class Following:
    """How labels are carried on."""

    # Whether places where motion fails keep their last label, in place of unknown
    holds: bool = False
    # Every so many frames one is labelled; None labels the newest whenever the network is free
    every: int | None = None
    channel_order: str = "rgb"  # Of the frames
    # The vocabulary's in force; labels of another one are not carried on
    version: Callable[[], int | None] = lambda: None


def following_of(
    follow: Any, every: Any, policy: str | None, sources: Sequence[Source]
) -> Following | None:
    """How labels are carried; None if they are not.

    ``follow`` None carries them where all sources are cameras and the newest frame counts.
    """
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
    return Following(holds=follow == "hold", every=every) if follow else None


def source_time(frame: Frame) -> float:
    """When a frame was taken: a file's are read faster, so its own time stamps count."""
    own = frame.pts_seconds if frame.clock == "file" else None
    return frame.captured_at if own is None else own


def follows(before: Frame | None, now: Frame) -> bool:
    """Whether labels of one frame can be moved to the next that was not dropped."""
    if before is None or _size_of(before) != _size_of(now) or max(_size_of(now)) >= 32767:
        return False
    steps = max(now.index - before.index, 1)
    return 0.0 <= source_time(now) - source_time(before) <= _LONGEST_STEP * steps


def _size_of(frame: Frame) -> tuple[int, int]:
    on_gpu = frame.on_gpu  # another thread may let it leave
    height, width = (frame.image if on_gpu is None else on_gpu).shape[:2]
    return int(height), int(width)


def look(frame: Frame, channel_order: str) -> Glance:
    """The small picture of a frame, made where it lies."""
    on_gpu, size_hw = frame.on_gpu, follow_size(_size_of(frame))
    if on_gpu is None:
        return Glance.at(frame.image, channel_order, size_hw)
    small = core.outside_captures(lambda: _fetched(on_gpu, channel_order, size_hw))
    return Glance.at(small, "rgb", size_hw)


def _fetched(frame: Any, channel_order: str, size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A frame on a GPU in RGB, made small there."""
    is_nv12, size_hw = isinstance(frame, Nv12Frame), (2 * size_hw[0], 2 * size_hw[1])
    device = (frame.luma if is_nv12 else frame).device
    stream = core.Stream(int(device.partition(":")[2]))
    planes = ops.preprocess(
        (frame.luma, frame.chroma) if is_nv12 else frame,
        size_hw=size_hw,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255,) * 3,
        channel_order="rgb" if is_nv12 else channel_order,
        colour_matrix=frame.colour_matrix if is_nv12 else "bt601",
        stream=stream.handle,
    )
    host = np.empty((3, *size_hw), np.float32)
    planes.copy_to(host, stream.handle)
    stream.synchronize()
    return np.ascontiguousarray(np.rint(host).astype(np.uint8).transpose(1, 2, 0))


@dataclass
class _Track:
    """One source: its newest frame, and the labels that are carried to it."""

    holds: bool
    mover: LabelMover = field(default_factory=LabelMover)
    frame: Frame | None = None
    glance: Any = None  # of the newest frame that the ways lead to
    seg: Segmentation | None = None  # what is carried
    labels: Any = None  # of it; the caller may write into its own
    way: Way | None = None  # back to it; None after a scene cut
    awaited: Way | None = None  # back to the frame that the network has
    period: float = 0.0  # seconds between the source's frames
    waiting: list[tuple[Frame, Glance]] = field(default_factory=list)
    count: int = 0  # frames since the one that was labelled

    def begin(self, seg: Segmentation, way: Way) -> None:
        """Carry other labels."""
        self.seg, self.labels, self.way = seg, seg.labels.copy(), way

    def go_on(self, glance: Glance) -> None:
        """Lengthen the ways by the step to the next frame; a scene cut ends them."""
        step, self.glance = self.mover.step(self.glance, glance), glance
        self.way, self.awaited = (
            None if way is None or step is None else self.mover.extend(way, step)
            for way in (self.way, self.awaited)
        )

    def result(self, frame: Frame) -> Segmentation:
        """The result of the frame that the ways lead to."""
        start, seg, labels = time.perf_counter(), self.seg, self.labels
        assert seg is not None and seg.frame is not None  # noqa: PT018
        if self.way is not None:
            labels, self.way = self.mover.move(labels, self.way, self.glance, holds=self.holds)
        else:
            labels = labels.copy() if self.holds else np.full_like(labels, seg.unknown)
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


_Job = tuple[Future[tuple[Segmentation, float]], _Track]


class NewestFrames:
    """Gives every frame labels, while the network labels the newest one whenever it is free.

    A network that is quicker than the sources' frames come labels each; nothing is moved then.
    ``label`` runs in a thread of its own; all methods belong to one other thread.
    """

    def __init__(
        self,
        label: _Label,
        names: Iterable[str],
        settings: Following,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._label, self._order, self._version = label, settings.channel_order, settings.version
        self._tracks = {name: _Track(settings.holds) for name in names}
        self._thread = ThreadPoolExecutor(1, "label")
        self._offered: _Job | None = None  # the newest frame, until the network is free
        self._under_way: _Job | None = None
        self._took = 0.0

    def next(self, next_frame: Callable[[], Any]) -> Segmentation:
        """The next frame's result; the first of a source, and of new classes, is waited for."""
        frame = next_frame()
        track, glance = self._tracks[frame.source], look(frame, self._order)
        self._catch_up()
        before, track.frame = track.frame, frame
        if before is not None and follows(before, frame):
            frames = max(frame.index - before.index, 1)
            track.period = (source_time(frame) - source_time(before)) / frames or track.period
            track.go_on(glance)
        else:
            track.glance, track.seg, track.awaited = glance, None, None
        self._offer(frame, track)
        rate = sum(1.0 / one.period for one in self._tracks.values() if one.period)
        if self._under_way is None and 0.0 < self._took * rate < _KEEPS_UP:
            self._finish()
        while (seg := track.seg) is None or self._version() not in (None, seg.vocabulary_version):
            if self._under_way is None and self._offered is None:
                self._offer(frame, track)
            self._finish()
        return seg if seg.frame is frame else track.result(frame)

    def close(self) -> None:
        """Finish what is being labelled."""
        self._thread.shutdown(cancel_futures=True)

    def _offer(self, frame: Frame, track: _Track) -> None:
        self._offered = self._thread.submit(self._timed, frame), track

    def _catch_up(self) -> None:
        """Take back the frame that waits, unless the network has it by now."""
        if self._offered is not None and not self._offered[0].cancel():
            self._begin()
        self._offered = None
        if self._under_way is not None and self._under_way[0].done():
            self._finish()

    def _begin(self) -> None:
        """The network has the frame that waited, so it is done with the one before."""
        assert self._offered is not None
        if self._under_way is not None:
            self._finish()
        self._under_way, self._offered = self._offered, None
        self._under_way[1].awaited = Way.begin(self._under_way[1].glance)

    def _finish(self) -> None:
        """Wait for the frame under way, or for the one that waits; its labels are carried on."""
        if self._under_way is None:
            self._begin()
        assert self._under_way is not None
        (future, track), self._under_way = self._under_way, None
        way, track.awaited = track.awaited, None
        seg, self._took = future.result()
        if way is not None:  # else other frames began since
            track.begin(seg, way)

    def _timed(self, frame: Frame) -> tuple[Segmentation, float]:
        start = self._now()
        return self._label(frame), self._now() - start


class KeyFrames:
    """Labels one of ``every`` frames; the others take those of the nearer one, moved.

    ``ordered`` makes what labels frames. All methods belong to one thread.
    """

    def __init__(
        self,
        label: _Label,
        names: Iterable[str],
        settings: Following,
        ordered: Callable[..., InOrder[_Turn, tuple[_Turn, Segmentation | None]]] = ONE_BY_ONE,
    ) -> None:
        self._label, self._order, self._every = label, settings.channel_order, settings.every or 1
        self._tracks = {name: _Track(settings.holds) for name in names}
        self._jobs = ordered(self._work, every=self._every)
        self._ready: deque[Segmentation] = deque()
        self.close = self._jobs.close

    def next(self, next_frame: Callable[[], Frame | str]) -> Segmentation:
        """The next frame's result; StopIteration where every one was given.

        Frames that wait for the next labelled one do so until ``next_frame`` gives their source's
        name, or there are no more.
        """
        while not self._ready:
            try:
                self._take(*self._jobs.next(lambda: self._turn(next_frame())))
            except StopIteration:
                for track in self._tracks.values():
                    self._release(track)
                if not self._ready:
                    raise
        return self._ready.popleft()

    def has_waiting(self, source: str) -> bool:
        """Whether frames of a source wait for the next one that is labelled."""
        return bool(self._tracks[source].waiting)

    def _turn(self, frame: Frame | str) -> _Turn:
        if isinstance(frame, str):
            return frame, 1, False
        track = self._tracks[frame.source]
        goes_on = follows(track.frame, frame)
        track.count = (track.count + 1) % self._every if goes_on else 0
        track.frame = frame
        return frame, track.count, goes_on

    def _work(self, turn: _Turn) -> tuple[_Turn, Segmentation | None]:
        frame, position, _ = turn
        return turn, None if isinstance(frame, str) or position else self._label(frame)

    def _take(self, turn: _Turn, seg: Segmentation | None) -> None:
        frame, position, goes_on = turn
        if isinstance(frame, str):
            self._release(self._tracks[frame])
            return
        track, glance = self._tracks[frame.source], look(frame, self._order)
        if seg is not None:
            led_back: deque[Segmentation] = deque()
            back = replace(track, glance=glance)
            back.begin(seg, Way.begin(glance))
            while goes_on and track.waiting:  # up to a scene cut
                back.go_on(track.waiting[-1][1])
                if back.way is None:
                    break
                led_back.appendleft(back.result(track.waiting.pop()[0]))
            self._release(track)
            self._ready += [*led_back, seg]
            track.begin(seg, Way.begin(glance))
            track.glance = glance
        elif track.seg is not None:  # else the engine refused the frame that it had
            track.waiting.append((frame, glance))
            if 2 * position <= self._every:
                self._release(track)

    def _release(self, track: _Track) -> None:
        """Carry the last labels on to the frames that wait."""
        for frame, glance in track.waiting:
            track.go_on(glance)
            self._ready.append(track.result(frame))
        track.waiting.clear()
