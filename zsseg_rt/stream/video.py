"""Videos and cameras through PyAV, which is FFmpeg: files, HTTP, RTSP and V4L2."""

from __future__ import annotations

import errno
import functools
import re
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

from zsseg_rt.errors import SourceError
from zsseg_rt.stream.conversion import Converter
from zsseg_rt.stream.source import MOST_PIXELS, Lateness, Picture, Reader, check_size
from zsseg_rt.stream.video_errors import VideoKind, explain, import_av

OPENS_WITHIN = 5.0
"""Seconds that opening a camera may take."""
SILENT_FOR = 10.0
"""Seconds that a network camera may take for its next packet."""

# Without a limit FFmpeg studies an RTSP stream for 0.9 s before the first frame. Its option
# nobuffer is not used: it discards the first key frame, which costs as much again.
_NETWORK: Mapping[str, str] = MappingProxyType({"analyzeduration": "100000"})
# Each kind opens by its own protocols alone. FFmpeg before 8.1, PyAV before 18, knows no
# max_redirects and follows a camera to other addresses.
_OPTIONS: Mapping[VideoKind, Mapping[str, str]] = MappingProxyType(
    {
        "http": {
            **_NETWORK, "max_redirects": "0", "protocol_whitelist": "http,https,tcp,tls,httpproxy",
        },
        "rtsp": {
            **_NETWORK, "rtsp_transport": "tcp",
            "protocol_whitelist": "rtsp,rtp,srtp,tcp,udp,tls,http,https",
        },
        "file": {"protocol_whitelist": "file"},
        "v4l2": {},
    }
)  # fmt: skip
_FORMATS: Mapping[VideoKind, str] = MappingProxyType({"rtsp": "rtsp", "v4l2": "v4l2"})
# Texts that name other files or addresses, which FFmpeg would open whatever the text's own name is.
_PLAYLISTS = frozenset(
    ("concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest")
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
        device: Where the engine wants its frames, ``"cpu"`` or ``"cuda:N"``.
    """

    name: str
    url: str = field(repr=False)
    kind: VideoKind
    channel_order: str = "rgb"
    options: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def live(self) -> bool:
        """Everything but a file is a camera."""
        return self.kind != "file"

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Decode packet by packet: one that is damaged costs itself alone."""
        av = import_av()
        try:
            container = self._open(av)
        except av.FFmpegError as exc:
            raise self._error(exc) from None  # its text holds the password
        # Closed last: packets and frames of a camera lie in its driver's memory.
        with closing(container):
            stream = self._video_stream(container)
            # FFmpeg makes up the times of JPEGs over HTTP, which have none.
            tells_time = self.kind in ("http", "rtsp") and "jpeg" not in container.format.name
            found = False
            with (
                closing(container.demux(stream)) as packets,
                closing(self._read(av, packets, reader, tells_time)) as pictures,
            ):
                for picture in pictures:
                    found = True
                    yield picture
        if self.live:
            raise SourceError(f"{self.name}: the camera's stream ended. Check that it is on.")
        if not found:
            raise SourceError(f"{self.name}: expected a video, decoded no frame. Is it whole?")

    def _open(self, av: Any) -> Any:
        options = {**_OPTIONS[self.kind], "max_pixels": str(MOST_PIXELS), **self.options}
        if self.kind not in _FORMATS:
            options["format_whitelist"] = _single_files(av)
        return av.open(
            self.url,
            format=_FORMATS.get(self.kind),
            options=options,
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
        if stream.codec_context is None:
            raise SourceError(f"{self.name}: expected a video, got one in a format that FFmpeg "
                              "does not decode. Convert it to H.264.")  # fmt: skip
        check_size(self.name, stream.codec_context.width, stream.codec_context.height)
        # A size that comes later, or differs from what the container says, is refused by decoders.
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        stream.thread_type = "SLICE" if self.live else "AUTO"  # frame threads add delay
        return stream

    def _read(
        self, av: Any, packets: Iterator[Any], reader: Reader, tells_time: bool
    ) -> Generator[Picture, None, None]:
        """The pictures of sound frames; holds no frame of a camera while it waits."""
        is_file = self.kind == "file"
        converter = Converter(self.channel_order, turns=is_file, device=self.device)
        start: float | None = None
        lateness = Lateness()
        while (decoded := self._next_frames(av, packets, reader)) is not None:
            frames, arrived_at = decoded
            while frames:
                frame = frames.pop(0)
                start = frame.time if start is None else start
                captured_at, clock = capture_time(self.kind, frame.time, arrived_at)
                late = lateness.of(frame.time, arrived_at) if tells_time else 0.0
                picture = Picture(
                    **converter.take(frame),
                    captured_at=captured_at - late,
                    late=late,
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
        if self.kind in ("http", "rtsp") and error.errno == errno.EIO and not _is_known(self.url):
            return SourceError(f"{self.name}: cannot be read: unknown host. Check its name.")
        return explain(error, self.name, self.kind)


@functools.cache
def _single_files(av: Any) -> str:
    """The formats that hold pictures themselves, as FFmpeg takes a list."""
    return ",".join(sorted(av.formats_available - _PLAYLISTS))


def _is_known(url: str) -> bool:
    """Whether the host of an address can be found; FFmpeg calls it an input/output error."""
    authority = re.sub(r"^\w+://|[/?#].*", "", url, flags=re.DOTALL)
    try:
        socket.getaddrinfo(urlsplit(f"//{authority.rpartition('@')[2]}").hostname, None)
    except (OSError, ValueError):
        return False
    return True


def capture_time(
    kind: VideoKind, stamp: float | None, arrived_at: float
) -> tuple[float, Literal["driver", "arrival", "file"]]:
    """When a frame was captured, and whose clock says so.

    Drivers of V4L2 stamp frames with CLOCK_MONOTONIC, which is ``time.monotonic()``.
    """
    if kind == "file":
        return arrived_at, "file"
    if kind == "v4l2" and stamp is not None and 0.0 <= arrived_at - stamp < _CLOCK_SLACK:
        return stamp, "driver"
    return arrived_at, "arrival"
