"""Videos and cameras through PyAV, which is FFmpeg: files, HTTP, RTSP and V4L2."""

from __future__ import annotations

import errno
import functools
import itertools
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from zsseg_rt.errors import SourceError
from zsseg_rt.stream.conversion import Converter
from zsseg_rt.stream.source import (
    MOST_PIXELS,
    Lateness,
    Picture,
    Reader,
    RecordingTimes,
    check_size,
)
from zsseg_rt.stream.video_errors import NO_STREAM, VideoKind, explain, import_av, why_unreachable

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
STILL_EVERY = 1.0
"""Seconds until an address of a single image, such as a camera's snapshot, is read again."""
_CLOCK_SLACK = 10.0  # seconds; a driver whose times are further off does not use our clock


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What a source reads: its packets, times of a recording, and what its own times mean."""

    packets: Iterator[Any]
    decode: Callable[[Any], Sequence[Any]] = lambda packet: packet.decode()
    times: RecordingTimes | None = None
    tells_time: bool = False
    is_image: bool = False  # in a format of single images


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
        loops: Whether a video of several frames begins again at its end; its times go on.
    """

    name: str
    url: str = field(repr=False)
    kind: VideoKind
    channel_order: str = "rgb"
    options: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    loops: bool = False

    @property
    def live(self) -> bool:
        """Everything but a file is a camera."""
        return self.kind != "file"

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Decode packet by packet: one that is damaged costs itself alone."""
        av, times, goes_on = import_av(), None, True
        while goes_on:
            found = 0
            with ExitStack() as parts:
                try:
                    opened = self._opened(av, parts)
                except av.FFmpegError as exc:
                    raise self._error(exc) from None  # its text holds the password
                times = times or opened.times
                with closing(self._read(av, opened, reader, times)) as pictures:
                    for picture in pictures:
                        found += 1
                        yield picture
            if not (self.live or found):
                raise SourceError(f"{self.name}: expected a video, decoded no frame. Is it whole?")
            if times is not None:
                times.begin_again()
            is_still = self.live and opened.is_image and found == 1
            goes_on = is_still or (self.loops and found > 1)
            if goes_on and reader.wait(STILL_EVERY if is_still else 0.0):
                return
        if self.live:
            raise SourceError(f"{self.name}: the camera's stream ended. Check that it is on.")

    def _opened(self, av: Any, parts: ExitStack) -> _Opened:
        """What is read; ``parts`` close it, and containers last: they hold packets and frames."""
        if self.kind == "http" and (opened := self._open_jpegs(av, parts)) is not None:
            return opened
        container = parts.enter_context(closing(self._open(av, _FORMATS.get(self.kind))))
        stream = self._video_stream(container)
        times = None
        if not self.live:
            joined = bool(container.format.flags & av.format.Flags.ts_discont.value)
            times = RecordingTimes(self.name, stream.guessed_rate, joined=joined)
        return _Opened(
            packets=parts.enter_context(closing(container.demux(stream))),
            times=times,
            tells_time=self.kind in ("http", "rtsp"),
            is_image=container.format.name.endswith("_pipe"),
        )

    def _open_jpegs(self, av: Any, parts: ExitStack) -> _Opened | None:
        """Read MJPEG by its images; None for what is none.

        FFmpeg refuses it without a first boundary or the parts' type, and waits for several images.
        """
        with ExitStack() as tried:
            container = tried.enter_context(closing(self._open(av, "data")))
            chunks = _bytes_of(tried.enter_context(closing(container.demux())))
            head, verdict = b"", None
            while verdict is None and (chunk := next(chunks, None)) is not None:
                head += chunk
                verdict = begins_with_jpegs(head)
            if head.lstrip().startswith(b"<"):
                raise SourceError(f"{self.name}: cannot be read: it is a page. {NO_STREAM}")
            if not verdict:
                return None
            parts.push(tried.pop_all())
        codec = av.CodecContext.create("mjpeg", "r")
        codec.options = {"max_pixels": str(MOST_PIXELS)}
        return _Opened(
            packets=map(av.Packet, cut_jpegs(self.name, itertools.chain([head], chunks))),
            decode=codec.decode,
            is_image=head.startswith(START),
        )

    def _open(self, av: Any, kind: str | None) -> Any:
        options = {**_OPTIONS[self.kind], "max_pixels": str(MOST_PIXELS), **self.options}
        if kind is None:
            options["format_whitelist"] = _single_files(av)
        elif kind == "data":
            options["raw_packet_size"] = str(1 << 16)
        return av.open(
            self.url,
            format=kind,
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
        self, av: Any, opened: _Opened, reader: Reader, times: RecordingTimes | None
    ) -> Generator[Picture, None, None]:
        """The pictures of sound frames; holds no frame of a camera while it waits."""
        converter = Converter(self.channel_order, turns=not self.live, device=self.device)
        start: float | None = None
        lateness = Lateness()
        while (decoded := self._next_frames(av, opened, reader)) is not None:
            frames, arrived_at = decoded
            while frames:
                frame = frames.pop(0)
                start = frame.time if start is None else start
                captured_at, clock = capture_time(self.kind, frame.time, arrived_at)
                late = lateness.of(frame.time, arrived_at) if opened.tells_time else 0.0
                stamp = None if frame.time is None or start is None else frame.time - start
                if times is not None:
                    stamp = times.of(frame.time, _decoding_time(frame))
                picture = Picture(
                    **converter.take(frame),
                    captured_at=captured_at - late,
                    late=late,
                    clock=clock,
                    pts_seconds=stamp,
                )
                del frame
                yield picture

    def _next_frames(
        self, av: Any, opened: _Opened, reader: Reader
    ) -> tuple[list[Any], float] | None:
        """The frames of the next packet, and when it arrived; None at the end."""
        asked_at = time.monotonic()
        try:
            packet = next(opened.packets, None)
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
            frames = list(opened.decode(packet))
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
        is_network = self.kind in ("http", "rtsp") and error.errno == errno.EIO
        if is_network and (reason := why_unreachable(self.url)):  # such as of an unknown host
            return SourceError(f"{self.name}: cannot be read: {reason}. Check the address.")
        return explain(error, self.name, self.kind, self.url)


@functools.cache
def _single_files(av: Any) -> str:
    """The formats that hold pictures themselves, as FFmpeg takes a list."""
    return ",".join(sorted(av.formats_available - _PLAYLISTS))


def _bytes_of(packets: Iterable[Any]) -> Iterator[bytes]:
    """The bytes of a connection until it ends: an error of FFmpeg where no length is told."""
    try:
        yield from map(bytes, packets)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise


def _decoding_time(frame: Any) -> float | None:
    return None if frame.dts is None else float(frame.dts * frame.time_base)


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


START = b"\xff\xd8\xff"
# A marker with a length, the start or the end; not a stuffed byte, a restart or filling.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_HEAD = re.compile(rb"[\t\r\n -~]*(\xff(\xd8)?)?")  # boundaries and headers, up to an image
_LONGEST_HEAD, _LONGEST_IMAGE = 1 << 16, 1 << 26  # bytes


def begins_with_jpegs(head: bytes) -> bool | None:
    """Whether a camera's first bytes are those of MJPEG; None if it takes more to tell."""
    text, start, _ = head.partition(START)
    if _HEAD.fullmatch(text) is None or len(text) > _LONGEST_HEAD:
        return False
    return True if start else None


def cut_jpegs(name: str, chunks: Iterable[bytes]) -> Generator[bytes, None, None]:
    """The images in a camera's bytes, by their own structure: no boundary is needed.

    One without an end mark ends where the next one begins.

    Raises:
        SourceError: An image has no end.
    """
    data, at = bytearray(), 0  # where the next marker may be; 0 before an image has begun
    for chunk in chunks:
        data += chunk
        while True:
            if not at and (start := data.find(START)) >= 0:
                del data[:start]
                at = 2
            if not at or (marker := _MARKER.search(data, at)) is None:
                break
            begin, end = marker.span()
            if marker[1] in (b"\xd8", b"\xd9"):
                size, at = (begin if marker[1] == b"\xd8" else end), 0
                yield bytes(data[:size])
                del data[:size]
            elif len(data) < end + 2:
                break
            else:
                at = end + max(int.from_bytes(data[end : end + 2], "big"), 2)
        if not at:
            del data[:-2]
        at = at and max(at, len(data) - 4)
        if len(data) > _LONGEST_IMAGE:
            raise SourceError(f"{name}: expected JPEGs, got one without an end. Check the camera.")
