"""Where labelled frames go: each sink writes in a thread of its own and may fail alone."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zsseg_rt.errors import ArgumentError, SourceError, ZssegError
from zsseg_rt.files import is_folder
from zsseg_rt.result import Segmentation
from zsseg_rt.stream.gstreamer.rtsp_sink import RtspSink
from zsseg_rt.stream.overlay_video import OverlayVideo
from zsseg_rt.stream.source import redact
from zsseg_rt.stream.writers import Callback, JsonLines, MaskFolder

__all__ = ["Sink", "SinkStats", "SinkTarget", "Writer", "open_writers"]

QUEUE = 8
"""Frames that wait for a sink at most."""

SinkTarget = str | Path | Callable[[Segmentation], object]

_LOOK = 0.3  # seconds; see runner: a signal handler may ask to hurry just before a wait begins
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """What a sink writes with; used by one thread at a time."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def files(self) -> list[str]:
        """The files that were begun."""

    def write(self, seg: Segmentation) -> None:
        """Write one labelled frame.

        Raises:
            ZssegError: It cannot be written; nothing more will be.
        """

    def close(self) -> None:
        """Finish what was written.

        Raises:
            ZssegError: It cannot be finished.
        """


@dataclass(frozen=True, kw_only=True)
class SinkStats:
    """How one sink is doing.

    Attributes:
        name: Its file, folder or function.
        written: Frames that were written.
        dropped: Frames of cameras that it was too slow for.
        files: The files that were begun; a folder for masks.
        error: Why it ended early, or None.
    """

    name: str
    written: int
    dropped: int
    files: tuple[str, ...]
    error: str | None = None


def open_writers(
    targets: Sequence[SinkTarget], *, channel_order: str, alpha: float
) -> list[Writer]:
    """Read what sinks shall be; folders are made, files are begun with the first frame.

    Args:
        targets: Each ``NAME.mp4`` (overlay video), ``NAME.jsonl``, ``NAME/`` (label pictures),
            ``rtsp://@:PORT/NAME`` (overlays for viewers), or a function that is called with each
            :class:`~zsseg_rt.Segmentation`.
        channel_order: Of the frames.
        alpha: Weight of the overlay's colours, in [0, 1].

    Raises:
        ArgumentError: One is none of these, or a file is named twice.
        SourceError: A folder is absent or cannot be made, or a port cannot be had.
        BackendUnavailableError: PyAV or GStreamer is needed and not installed.
    """
    paths = [Path(target) for target in targets if not callable(target)]
    for path in paths:
        if paths.count(path) > 1:
            raise ArgumentError(f"sink: expected different files, got {path} twice")
    if not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha: expected a weight in [0, 1], got {alpha}")
    return [_open_writer(target, channel_order, alpha) for target in targets]


def _open_writer(target: SinkTarget, channel_order: str, alpha: float) -> Writer:
    if callable(target):
        return Callback(target)
    text, path = str(target), Path(target)
    if text.lower().startswith("rtsp://"):
        return RtspSink(text, channel_order=channel_order, alpha=alpha)
    if "://" not in text:
        if text.endswith("/") or is_folder(path):
            return MaskFolder(path)
        if path.suffix.lower() == ".mp4":
            return OverlayVideo(path, channel_order=channel_order, alpha=alpha)
        if path.suffix.lower() == ".jsonl":
            return JsonLines(path)
    raise ArgumentError(
        "sink: expected NAME.mp4, NAME.jsonl, a folder NAME/ or rtsp://@:PORT/NAME, got "
        f"{redact(text)}"
    )


class Sink:
    """Hands frames to a writer in a thread of its own; the first error ends it, once and for all.

    Args:
        writer: What writes; closed by the sink.
    """

    def __init__(self, writer: Writer) -> None:
        self.name = writer.name
        self._writer = writer
        self._waiting: deque[Segmentation] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._hurried = self._is_over = False
        self._written = self._dropped = 0
        self._error: ZssegError | None = None
        self._thread = threading.Thread(target=self._work, name=f"write {self.name}", daemon=True)
        self._thread.start()

    def put(self, seg: Segmentation, *, waits: bool) -> None:
        """Leave a frame to be written.

        Args:
            seg: The labelled frame.
            waits: Whether to wait for room; otherwise a sink that is too slow misses this frame.
        """
        with self._changed:
            while waits and self._is_full and not (self._hurried or self._is_over):
                self._changed.wait(_LOOK)
            if self._is_over:
                return
            if self._is_full:
                self._dropped += 1
                return
            self._waiting.append(seg)
            self._changed.notify_all()

    def hurry(self) -> None:
        """Let nobody wait for room any more; safe in a signal handler."""
        with self._changed:
            self._hurried = True
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
        if self._thread.is_alive():
            _log.error("%s: not finished in time, left as it is", self.name)

    def stats(self) -> SinkStats:
        """How it is doing."""
        with self._changed:
            return SinkStats(
                name=self.name,
                written=self._written,
                dropped=self._dropped,
                files=tuple(self._writer.files),
                error=None if self._error is None else str(self._error),
            )

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= QUEUE

    def _work(self) -> None:
        # Any other error, such as one of a caller's function, is printed by the thread.
        error: ZssegError | None = SourceError(
            f"{self.name}: writing failed, see the traceback above"
        )
        try:
            self._write_all()
            error = None
        except ZssegError as exc:
            error = exc
        finally:
            with self._changed:
                self._error, self._is_over = error, True
                self._waiting.clear()
                self._changed.notify_all()
            if error is not None:
                _log.error("%s", error)

    def _write_all(self) -> None:
        try:
            while (seg := self._next()) is not None:
                self._writer.write(seg)
                with self._changed:
                    self._written += 1
        finally:
            self._writer.close()

    def _next(self) -> Segmentation | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()
