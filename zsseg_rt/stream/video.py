"""Videos and cameras through PyAV, which is FFmpeg: files, HTTP, RTSP and V4L2."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from zsseg_rt.errors import SourceError
from zsseg_rt.stream.conversion import Converter
from zsseg_rt.stream.source import Picture, Reader
from zsseg_rt.stream.video_errors import VideoKind, explain, import_av

__all__ = ["VideoKind", "VideoSource", "capture_time"]

OPENS_WITHIN = 5.0
"""Seconds that opening a camera may take."""
SILENT_FOR = 10.0
"""Seconds that a network camera may take for its next packet."""

# Without a limit FFmpeg studies an RTSP stream for 0.9 s before the first frame. Its option
# nobuffer is not used: it discards the first key frame, which costs as much again.
_NETWORK: Mapping[str, str] = MappingProxyType({"analyzeduration": "100000"})
_OPTIONS: Mapping[VideoKind, Mapping[str, str]] = MappingProxyType(
    {"http": _NETWORK, "rtsp": {**_NETWORK, "rtsp_transport": "tcp"}, "file": {}, "v4l2": {}}
)
_CLOCK_SLACK = 10.0  # seconds; a driver whose times are further off does not use our clock


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video file or a camera.

    Attributes:
        name: The URI without a password.
        url: What FFmpeg opens.
        kind: How it is opened.
        channel_order: Of the frames.
        options: Further options of FFmpeg's.
    """

    name: str
    url: str = field(repr=False)
    kind: VideoKind
    channel_order: str = "rgb"
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Everything but a file is a camera."""
        return self.kind != "file"

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Decode packet by packet: one that is damaged costs itself alone.

        Raises:
            SourceError: It cannot be opened, no frame can be decoded, or a camera's stream ends.
            BackendUnavailableError: PyAV is not installed.
        """
        av = import_av()
        try:
            container = self._open(av)
        except av.FFmpegError as exc:
            raise self._error(exc) from None  # its text holds the password
        # Closed last: packets and frames of a camera lie in its driver's memory.
        with closing(container):
            stream = self._video_stream(container)
            found = False
            with (
                closing(container.demux(stream)) as packets,
                closing(self._read(av, packets, reader)) as pictures,
            ):
                for picture in pictures:
                    found = True
                    yield picture
        if self.live:
            raise SourceError(f"{self.name}: the camera's stream ended. Check that it is on.")
        if not found:
            raise SourceError(f"{self.name}: expected a video, decoded no frame. Is it whole?")

    def _open(self, av: Any) -> Any:
        return av.open(
            self.url,
            format="v4l2" if self.kind == "v4l2" else None,
            options={**_OPTIONS[self.kind], **self.options},
            timeout=(OPENS_WITHIN, SILENT_FOR) if self.live else None,
            metadata_errors="replace",
        )

    def _video_stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise SourceError(f"{self.name}: expected a video, found no pictures in it")
        if self.kind == "http" and container.duration is not None:
            raise SourceError(
                f"{self.name}: expected a camera's endless stream, got a file. Download it, and "
                "name the file."
            )
        stream = container.streams.video[0]
        stream.thread_type = "SLICE" if self.live else "AUTO"  # frame threads add delay
        return stream

    def _read(
        self, av: Any, packets: Iterator[Any], reader: Reader
    ) -> Generator[Picture, None, None]:
        """The pictures of sound frames; holds no frame of a camera while it waits."""
        converter = Converter(self.channel_order, turns=self.kind == "file")
        start: float | None = None
        while (decoded := self._next_frames(av, packets, reader)) is not None:
            frames, arrived_at = decoded
            while frames:
                frame = frames.pop(0)
                start = frame.time if start is None else start
                captured_at, clock = capture_time(self.kind, frame.time, arrived_at)
                picture = Picture(
                    image=converter.image(frame),
                    captured_at=captured_at,
                    clock=clock,
                    pts_seconds=None if frame.time is None or start is None else frame.time - start,
                )
                del frame
                yield picture

    def _next_frames(
        self, av: Any, packets: Iterator[Any], reader: Reader
    ) -> tuple[list[Any], float] | None:
        """The frames of the next packet, and when it arrived; None at the end."""
        asked_at = time.monotonic()
        try:
            packet = next(packets, None)
        except av.FFmpegError as exc:
            if self.live:
                raise self._error(exc) from None
            reader.count_damaged()  # a file ends where it cannot be read any more
            return None
        if packet is None:
            return None
        arrived_at = time.monotonic()
        self._refuse_after_silence(arrived_at - asked_at)
        try:
            frames = packet.decode()
        except av.FFmpegError:
            frames = []
            if packet.size:
                reader.count_damaged()
        sound = [frame for frame in frames if not frame.is_corrupt]
        for _ in range(len(frames) - len(sound)):
            reader.count_damaged()
        return sound, arrived_at

    def _refuse_after_silence(self, seconds: float) -> None:
        """Where the next frame's start does not come in time, FFmpeg gives out what it still held.

        That frame is old, and does not mean that the camera is well.
        """
        if self.live and seconds >= SILENT_FOR:
            raise SourceError(
                f"{self.name}: expected frames, none came for {seconds:.0f} s. Check the camera."
            )

    def _error(self, error: Any) -> SourceError:
        return explain(error, self.name, self.kind)


def capture_time(
    kind: VideoKind, stamp: float | None, arrived_at: float
) -> tuple[float, Literal["driver", "arrival", "file"]]:
    """When a frame was captured, and whose clock says so.

    Drivers of V4L2 stamp frames with CLOCK_MONOTONIC, which is ``time.monotonic()``.

    Args:
        kind: How the source is read.
        stamp: The frame's own time stamp in seconds.
        arrived_at: When it arrived here.
    """
    if kind == "file":
        return arrived_at, "file"
    if kind == "v4l2" and stamp is not None and 0.0 <= arrived_at - stamp < _CLOCK_SLACK:
        return stamp, "driver"
    return arrived_at, "arrival"
