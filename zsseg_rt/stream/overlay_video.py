"""Overlays as a video that a power cut leaves playable."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.process import usable_cpus
from zsseg_rt.common.recordings import Rotation, Series, is_empty
from zsseg_rt.errors import SourceError
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.i420 import I420, encodable
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.video_errors import import_av
from zsseg_rt.stream.writers import OVERLAY_MARK, Tags, frame_of, require_folder, unwritable

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


class OverlayVideo:
    """Writes ``NAME.mp4``, H.264: each frame with its labels' colours laid over it.

    A source with a tag has ``NAME-TAG.mp4``. Where that exists, where the frames change their size,
    and with rotation, files are ``NAME-STAMP.mp4``; see ``Series``.
    Sides are made even by repeating the last row or column; longer ones than H.264 takes, smaller.
    """

    def __init__(
        self, path: Path, *, channel_order: str, painter: Painter, tags: Tags, rotation: Rotation
    ) -> None:
        require_folder(path, may_exist=False)
        self._av = import_av()
        self.name = str(path)
        self.files: list[str] = []
        self.whose: dict[str, str] = {}
        self._path, self._order, self._tags, self._rotation = path, channel_order, tags, rotation
        self._at = path  # the file that is written now
        self.folder: Path | None = path.parent
        self._series: dict[str, Series] = {}
        self._recordings: dict[str, _Recording] = {}
        self._painter = painter

    @property
    def painted(self) -> str | None:
        """Where overlays are painted."""
        return self._painter.painted

    def write(self, seg: Segmentation) -> None:
        """Encode one frame."""
        frame = frame_of(seg)
        try:
            recording = self._recording(seg, frame)
            self._painter.paint(seg, recording.canvas)
            recording.add(frame)
        except (OSError, ValueError, self._av.FFmpegError) as exc:
            self._finish(frame.source)
            self._forget_empty()
            raise unwritable(self._at, exc) from exc

    def close(self) -> None:
        """Finish all files, as far as that is possible."""
        errors = [error for source in list(self._recordings) if (error := self._finish(source))]
        for series in self._series.values():
            series.close()
        if errors:
            raise errors[0]

    def remove_old(self) -> None:
        """Remove what is not kept any more."""
        for series in self._series.values():
            series.remove_old()

    def _forget_empty(self) -> None:
        """Remove the file that is written if nothing came of it."""
        if str(self._at) in self.whose and is_empty(self._at):
            self._at.unlink()
            self.files.remove(str(self._at))
            del self.whose[str(self._at)]

    def _finish(self, source: str) -> SourceError | None:
        """Finish a source's file; says what kept it from that."""
        recording = self._recordings.pop(source, None)
        if recording is None:
            return None
        try:
            recording.close()
        except (OSError, self._av.FFmpegError) as exc:
            error = unwritable(recording.path, exc)
            error.__cause__ = exc
            return error
        return None

    def _recording(self, seg: Segmentation, frame: Frame) -> _Recording:
        recording = self._recordings.get(frame.source)
        if recording is not None:
            self._at = recording.path
            if not recording.is_over(frame, seg.labels.shape, self._rotation):
                return recording
            if error := self._finish(frame.source):
                raise error
        if frame.source not in self._series:
            stem = self._tags.join(self._path.stem, frame.source)
            self._series[frame.source] = Series(
                self._path.parent, stem, self._path.suffix, self._rotation
            )
        self._at = self._series[frame.source].begin()
        self.files.append(str(self._at))
        self.whose[str(self._at)] = frame.source
        canvas, size_hw = self._painter.canvas(seg), seg.labels.shape
        begun = _Recording(self._av, self._at, frame, size_hw, canvas, self._order)
        self._recordings[frame.source] = begun
        return begun


class _Recording:
    """One file."""

    def __init__(
        self,
        av: Any,
        path: Path,
        frame: Frame,
        size_hw: tuple[int, ...],
        canvas: npt.NDArray[np.uint8],
        order: str,
    ) -> None:
        self.path, self.canvas, self._size_hw = path, canvas, size_hw
        self._av, self._i420 = av, I420(encodable(canvas).shape[:2], channel_order=order)
        self._start = _time_of(frame)
        self._last_tick, self._last_key = -1, float("-inf")
        self._container = av.open(str(path), "w", format="mp4", options=_FRAGMENTS)
        self._container.metadata["comment"] = OVERLAY_MARK
        is_file = frame.clock == "file"
        options = {**_X264, **(_WHOLE_FRAMES if is_file else {})}
        self._stream = self._container.add_stream("libx264", rate=30, options=options)
        if is_file:
            self._stream.codec_context.thread_count = min(usable_cpus() + 1, _MOST_THREADS)
        height, self._stream.width = self._i420.planes.shape
        self._stream.height = height * 2 // 3
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)

    def is_over(self, frame: Frame, size_hw: tuple[int, ...], rotation: Rotation) -> bool:
        """Whether a frame belongs into the next file: for its size, or by rotation."""
        if self._size_hw != size_hw:
            return True
        seconds = _time_of(frame) - self._start
        if not rotation.is_on or seconds < self._last_key + _KEY_EVERY:  # before a fragment's end
            return False
        try:
            return rotation.is_due(seconds, self.path.stat().st_size)
        except FileNotFoundError:  # somebody removed it
            return True

    def add(self, frame: Frame) -> None:
        """Encode the canvas at the frame's time."""
        self._i420.convert(encodable(self.canvas))
        video = self._av.VideoFrame.from_ndarray(self._i420.planes, format="yuv420p")
        seconds = _time_of(frame) - self._start
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
