"""Where labelled frames go: each sink writes in a thread of its own and may fail alone."""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from glob import iglob
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import is_folder
from zsseg_rt.common.process import usable_cpus
from zsseg_rt.common.recordings import Rotation, Series, is_empty
from zsseg_rt.errors import ArgumentError, SourceError, ZssegError
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.conversion import encodable, i420
from zsseg_rt.stream.gstreamer.rtsp_sink import RtspSink
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.source import shown
from zsseg_rt.stream.video import import_av
from zsseg_rt.stream.writers import (
    OVERLAY_MARK,
    Callback,
    JsonLines,
    MaskFolder,
    Tags,
    Writer,
    frame_of,
    require_folder,
    unwritable,
    what_is_not_ours,
)

QUEUE = 8  # frames that wait for a sink at most
RETRY = 5.0  # seconds until a folder that took no files is tried again

SinkTarget = str | Path | Callable[[Segmentation], object]

_HURRIED = 0.5  # seconds that frames may wait in a sink of a stream that was stopped
_ROOM = 1 << 22  # bytes that are free again before a sink goes on
_LOOK = 0.3  # seconds; see runner: a signal handler may ask to hurry just before a wait begins
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SinkStats:
    """How one sink is doing."""

    name: str  # Its file, folder or function
    written: int  # Frames that were written
    dropped: int  # Frames of cameras that it was too slow for, or that came while it failed
    files: tuple[str, ...]  # The files that were begun; a folder for masks
    # Why it ended early, was not finished or cannot write now; or None
    error: str | None = None
    # The source of each file, of each folder's pictures, or of each address
    whose: Mapping[str, str] = field(default_factory=dict)
    # Where its newest overlay was painted, "cpu" or "gpu"; None without one
    painted: str | None = None


def open_writers(
    targets: Sequence[SinkTarget],
    *,
    channel_order: str,
    alpha: float,
    sources: Sequence[str] = (),
    rotation: Rotation | None = None,
    legend: bool = False,
) -> list[Writer]:
    """Read what sinks shall be; folders are made, files are begun with the first frame."""
    if not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha: expected a weight in [0, 1], got {alpha}")
    named = [str(target) for target in targets if not callable(target)]
    places = [place for text in named for place in _places(text, sources)]
    for place in places:
        if places.count(place) > 1:
            raise ArgumentError(
                f"sink: expected different files, got {_shown(place)} twice. Choose names that "
                "also differ with each source's number or name behind them."
            )
    if rotation is not None and rotation.is_on and all("://" in text for text in named):
        raise ArgumentError("rotate: expected a sink that is a file or a folder, got none")

    painter = functools.partial(Painter, channel_order=channel_order, alpha=alpha, legend=legend)

    def open_writer(target: SinkTarget) -> Writer:
        if callable(target):
            return Callback(target)
        return _open_writer(str(target), painter, Tags(sources), rotation or Rotation())

    return [open_writer(target) for target in targets]


def _places(text: str, sources: Sequence[str]) -> list[str]:
    """The files of a sink, before any stamp."""
    path, tags = Path(text), Tags(sources)
    if "://" in text or path.suffix.lower() != ".mp4" or not sources:
        return [text if "://" in text else str(path)]
    return [str(path.with_name(tags.join(path.stem, one) + path.suffix)) for one in sources]


def _shown(text: str) -> str:
    return shown(text) if "://" in text else text


def _open_writer(
    text: str, painter: Callable[[], Painter], tags: Tags, rotation: Rotation
) -> Writer:
    path = Path(text)
    if text.lower().startswith("rtsp://"):
        return RtspSink(text, painter=painter(), tags=tags)
    if text.strip() and "://" not in text:
        matches = iglob(text) if "*" in text else iter(())  # noqa: PTH207  # any folder's
        if theirs := what_is_not_ours(path) or next(matches, ""):
            raise ArgumentError(
                f"sink: expected a new place or one that this command wrote, got {theirs}. Several "
                "sources are a folder, a pattern in quotes, or @FILE with one per line."
            )
        if text.endswith("/") or is_folder(path):
            return MaskFolder(path, tags=tags, rotation=rotation)
        if path.suffix.lower() == ".mp4":
            return OverlayVideo(path, painter=painter(), tags=tags, rotation=rotation)
        if path.suffix.lower() == ".jsonl":
            return JsonLines(path, rotation=rotation)
    raise ArgumentError(
        "sink: expected NAME.mp4, NAME.jsonl, a folder NAME/ or rtsp://@:PORT/NAME, got "
        f"{_shown(text).strip() or 'an empty name'}"
    )


class Sink:
    """Hands frames to a writer in a thread of its own; an error ends it.

    With ``resumes`` an error of the disk's is waited out.
    """

    def __init__(self, writer: Writer, *, resumes: bool = False) -> None:
        self.name = writer.name
        self._writer, self._resumes = writer, resumes
        self._waiting: deque[Segmentation] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self.is_paused = self._is_over = self._is_left = False
        self._write_until = math.inf  # when what waits is dropped, if it was hurried
        self._written = self._dropped = self._dropped_before = 0
        self._error: ZssegError | None = None
        self._thread = threading.Thread(target=self._work, name=f"write {self.name}", daemon=True)
        self._thread.start()

    def put(self, seg: Segmentation, *, waits: bool) -> None:
        with self._changed:
            while waits and self._is_full and not self._is_over and self._write_until == math.inf:
                self._changed.wait(_LOOK)
            if self._is_over:
                return
            if self._is_full or self.is_paused:
                self._dropped += 1
                return
            self._waiting.append(seg)
            self._changed.notify_all()

    def hurry(self) -> None:
        """Let nobody wait for room, and drop what waits for long; safe in a signal handler."""
        with self._changed:
            self._write_until = time.monotonic() + _HURRIED
            self._changed.notify_all()

    def finish(self) -> None:
        """Write what waits, then no more; :meth:`join` waits for that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until all is written; after so many seconds the rest is left to itself."""
        if threading.current_thread() is self._thread:  # a forgotten stream ends in any thread
            return
        self._thread.join(seconds)
        with self._changed:
            if self._is_over:
                return
            self._is_left = True
            self._error = SourceError(f"{self.name}: not finished in time, left as it is")
        _log.error("%s", self._error)

    @property
    def has_failed(self) -> bool:
        """Whether an error ended it for good."""
        return self._is_over and self._error is not None

    def stats(self) -> SinkStats:
        with self._changed:
            return SinkStats(
                name=self.name,
                written=self._written,
                dropped=self._dropped,
                files=tuple(self._writer.files),
                error=None if self._error is None else str(self._error),
                whose=dict(self._writer.whose),
                painted=getattr(self._writer.painter, "painted", None),
            )

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= QUEUE

    def _work(self) -> None:
        error: ZssegError | None = None
        try:
            while (error := self._write_all()) is not None and self._is_mended(error):
                pass
        except BaseException:  # such as one of a caller's function: printed by the thread
            error = SourceError(f"{self.name}: writing failed, see the traceback above")
            raise
        finally:
            with self._changed:
                is_told = self._error is not None
                if not self._is_left:
                    self._error = error
                self._is_over = True
                self._waiting.clear()
                self._changed.notify_all()
            if error is not None and not is_told:
                _log.error("%s", error)

    def _write_all(self) -> ZssegError | None:
        try:
            with closing(self._writer):
                while (seg := self._next()) is not None:
                    self._writer.write(seg)
                    self._count()
        except ZssegError as exc:
            return exc
        return None

    def _count(self) -> None:
        with self._changed:
            self._written += 1
            is_mended = self._error is not None and not self._is_left
            if is_mended:
                self._error = None
        if is_mended:
            missed = self._dropped - self._dropped_before
            _log.warning("%s: written again, %d frames are missing", self.name, missed)

    def _is_mended(self, error: ZssegError) -> bool:
        """Wait until the folder takes files again; False if that is not waited for, or the end."""
        folder = self._writer.folder
        is_disk = isinstance(error.__cause__, OSError)
        if not (self._resumes and is_disk) or folder is None or self._closed:
            return False
        with self._changed:
            is_news, self.is_paused = self._error is None, True
            if is_news:
                self._error, self._dropped_before = error, self._dropped
            self._dropped += 1
            self._drop_waiting()
        if is_news:
            _log.error("%s It is tried again every %.0f s.", error, RETRY)
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, RETRY):
                    return False
            self._writer.remove_old()
            if has_room(folder):
                self.is_paused = False
                return True

    def _drop_waiting(self) -> None:
        self._dropped += len(self._waiting)
        self._waiting.clear()
        self._changed.notify_all()

    def _next(self) -> Segmentation | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed and time.monotonic() > self._write_until:
                self._drop_waiting()
            if not self._waiting:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()


def has_room(folder: Path) -> bool:
    """Whether a folder takes 4 MB."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM)
    except OSError:
        return False
    return True


_TICKS = 90_000  # per second
_KEY_EVERY = 1.0  # seconds; a fragment, which is what a power cut may cost
# Without flush_packets the fragments wait in a buffer, and a recording that was cut is unreadable.
_FRAGMENTS = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof",
    "flush_packets": "1",
}
_X264 = {"preset": "veryfast", "tune": "zerolatency", "crf": "23"}
# Threads that encode frames beside each other never wait for one another's slices. That holds back
# as many frames as there are threads, which a camera that fails would lose.
_WHOLE_FRAMES = {"x264-params": "sliced-threads=0"}
_MOST_THREADS = 8


class OverlayVideo(Writer):
    """Writes ``NAME[-TAG][-STAMP].mp4``, H.264: frames with their labels' colours over them."""

    def __init__(self, path: Path, *, painter: Painter, tags: Tags, rotation: Rotation) -> None:
        require_folder(path, may_exist=False)
        self._av = import_av()
        super().__init__(str(path), folder=path.parent)
        self._path, self._tags, self._rotation = path, tags, rotation
        self._at = path  # the file that is written now
        self._recordings: dict[str, _Recording] = {}
        self.painter = painter

    def write(self, seg: Segmentation) -> None:
        try:
            self._recording(seg).add(seg)
        except (OSError, ValueError, self._av.FFmpegError) as exc:
            with suppress(SourceError):
                self._finish(frame_of(seg).source)
            if str(self._at) in self.whose and is_empty(self._at):  # nothing came of it
                self._at.unlink()
                self.files.remove(str(self._at))
                del self.whose[str(self._at)]
            raise unwritable(self._at, exc) from exc

    def close(self) -> None:
        with ExitStack() as files:
            for source in self._recordings:
                files.callback(self._finish, source)

    def _finish(self, source: str) -> None:
        """Finish a source's file, if there is one."""
        recording = self._recordings.pop(source, None)
        if recording is not None:
            try:
                recording.close()
            except (OSError, self._av.FFmpegError) as exc:
                raise unwritable(recording.path, exc) from exc

    def _recording(self, seg: Segmentation) -> _Recording:
        source = frame_of(seg).source
        recording = self._recordings.get(source)
        if recording is not None:
            self._at = recording.path
            if not recording.is_over(seg, self._rotation):
                return recording
            self._finish(source)
        stem = self._tags.join(self._path.stem, source)
        series = Series(self._path.parent, stem, self._path.suffix, self._rotation)
        self._at = self._series.setdefault(source, series).begin()
        self.files.append(str(self._at))
        self.whose[str(self._at)] = source
        recording = self._recordings[source] = _Recording(self._av, self._at, seg, self.painter)
        return recording


class _Recording:
    """One file."""

    def __init__(self, av: Any, path: Path, seg: Segmentation, painter: Painter) -> None:
        frame, self.path, self._size_hw = frame_of(seg), path, seg.labels.shape
        self._av, self._painter, self._canvas = av, painter, painter.canvas(seg)
        self._planes: npt.NDArray[np.uint8] | None = None
        self._start = _time_of(frame)
        self._last_tick, self._last_key = -1, float("-inf")
        self._container = av.open(str(path), "w", format="mp4", options=_FRAGMENTS)
        self._container.metadata["comment"] = OVERLAY_MARK
        is_file = frame.clock == "file"
        options = {**_X264, **(_WHOLE_FRAMES if is_file else {})}
        self._stream = self._container.add_stream("libx264", rate=30, options=options)
        if is_file:
            self._stream.codec_context.thread_count = min(usable_cpus() + 1, _MOST_THREADS)
        height, width = encodable(self._canvas).shape[:2]
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)

    def is_over(self, seg: Segmentation, rotation: Rotation) -> bool:
        """Whether a frame belongs into the next file: for its size, or by rotation."""
        if self._size_hw != seg.labels.shape:
            return True
        seconds = _time_of(frame_of(seg)) - self._start
        if not rotation.is_on or seconds < self._last_key + _KEY_EVERY:  # before a fragment's end
            return False
        try:
            return rotation.is_due(seconds, self.path.stat().st_size)
        except FileNotFoundError:  # somebody removed it
            return True

    def add(self, seg: Segmentation) -> None:
        self._painter.paint(seg, self._canvas)
        self._planes = i420(encodable(self._canvas), self._painter.channel_order, self._planes)
        video = self._av.VideoFrame.from_ndarray(self._planes, format="yuv420p")
        seconds = _time_of(frame_of(seg)) - self._start
        self._last_tick = max(round(seconds * _TICKS), self._last_tick + 1)
        video.pts, video.time_base = self._last_tick, Fraction(1, _TICKS)
        if seconds >= self._last_key + _KEY_EVERY:
            video.pict_type = self._av.video.frame.PictureType.I
            self._last_key = seconds
        self._container.mux(self._stream.encode(video))

    def close(self) -> None:
        try:
            self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def _time_of(frame: Frame) -> float:
    """A file's own time; a camera's may begin anew when it comes back, so when it was captured."""
    if frame.clock == "file" and frame.pts_seconds is not None:
        return frame.pts_seconds
    return frame.captured_at
