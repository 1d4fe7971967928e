"""Videos and cameras through PyAV, which is FFmpeg: files, HTTP, RTSP and V4L2."""

from __future__ import annotations

import errno
import itertools
import re
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from zsseg_rt.common.extras import install_command, unavailable
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

VideoKind = Literal["file", "http", "rtsp", "v4l2"]

_NO_PLAYLISTS = (
    "Is it a video? Playlists and lists of files are not followed; gst:uridecodebin uri=ADDRESS "
    "plays one."
)
ANSWERS_WITHIN = 5.0  # seconds that a camera may take to answer
NO_STREAM = "Give the address of the camera's stream itself, not that of its page."
_REMEDIES = {
    "ConnectionRefusedError": "Check address and port, and that the camera is on.",
    "TimeoutError": "Check the address, and that the camera is on.",
    "ExitError": "Nothing came for too long. Check the address, and that the camera is on.",
    "FileNotFoundError": "Check the path.",
    "IsADirectoryError": "Name a file in it.",
    "InvalidDataError": "Is it a video?",
    "ArgumentError": _NO_PLAYLISTS,
    "ValueError": _NO_PLAYLISTS,  # as PyAV 15 calls it
    "ProtocolNotFoundError": "PyAV was built without this protocol. Use another.",
}
# FFmpeg calls it invalid data when a camera answers nothing.
_NETWORK_REMEDIES = {
    "InvalidDataError": "Nothing readable came. Check the address, and that the camera is on.",
    "OSError": "Check that the camera is on. If it redirects to another address, give that one: "
    "redirects are not followed.",
}
_DEVICE_REMEDIES = {
    errno.ENOENT: "Plug the camera in; zsseg-rt doctor lists the cameras it finds.",
    errno.ENODEV: "Plug the camera in; zsseg-rt doctor lists the cameras it finds.",
    errno.EACCES: "Allow it: sudo usermod -aG video $USER, then log in again.",
    errno.EBUSY: "Close the program that uses it; fuser /dev/video* names it.",
    errno.ENOTTY: "It is not a camera; zsseg-rt doctor lists the cameras it finds.",
    errno.EIO: "Check its cable and its port.",
    errno.EPROTO: "Check its cable and its port.",
    errno.ENOSPC: "Too many cameras share a USB bus: ask for a smaller size, a lower rate or "
    "format=mjpeg, or use another port.",
    errno.EINVAL: "It has no such format; v4l2-ctl --list-formats-ext lists those it has. Some "
    "cameras have a second device without pictures; zsseg-rt doctor lists both.",
}


def import_av() -> Any:
    """PyAV."""
    try:
        import av
    except ImportError as exc:
        expected = "av: expected PyAV to read and write video"
        raise unavailable(exc, "av", expected, install_command("stream")) from exc
    return av


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Take user and password out of a URL; a password may hold what urlsplit stumbles over."""
    match = re.fullmatch(r"(\w+://)([^/?#]*)@([^/?#@]*.*)", url, re.DOTALL)
    if match is None:
        return url, None
    user, _, password = match[2].partition(":")
    return f"{match[1]}{match[3]}", (unquote(user), unquote(password))


def answer_remedy(status: str, url: str) -> str:
    """Return advice where a camera answered with a status of HTTP or RTSP."""
    login = "Check user and password, and that its settings let in by Digest with MD5, or Basic."
    if split_login(url)[1] is None:
        login = "It asks for a login: put USER:PASSWORD@ before its name."
    return {
        "401": login,
        "403": "Check user, password and the user's rights.",
        "404": "Check the path behind the address.",
        "503": "It has no room for another viewer: end one.",
    }.get(status, "Check the camera's settings.")


def why_unreachable(url: str) -> str:
    """Return the system's error of connecting; empty if it works."""
    try:
        place = urlsplit(split_login(url)[0])
        port = place.port or {"http": 80, "https": 443}.get(place.scheme, 554)
        socket.create_connection((place.hostname or "", port), ANSWERS_WITHIN).close()
    except TimeoutError:
        return "No answer"
    except (OSError, ValueError) as exc:
        return str(getattr(exc, "strerror", None) or exc)
    return ""


OPENS_WITHIN = 5.0  # seconds that opening a camera may take
# Seconds that a network camera may take for its next packet: longer than a stream's patience, as
# FFmpeg gives out what it held back once it has waited in vain.
SILENT_FOR = 12.0

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
STILL_EVERY = 1.0  # seconds until an address of one image, such as a snapshot, is read again
_CLOCK_SLACK = 10.0  # seconds; a driver whose times are further off does not use our clock


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An open source: its packets, times of a recording, and what its own times mean."""

    packets: Iterator[Any]
    decode: Callable[[Any], Sequence[Any]] = lambda packet: packet.decode()
    times: RecordingTimes | None = None
    tells_time: bool = False
    is_image: bool = False  # in a format of single images


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video file or a camera."""

    name: str  # The URI without a password
    url: str = field(repr=False)  # What FFmpeg opens
    kind: VideoKind  # How it is opened
    channel_order: str = "rgb"  # Of the frames
    options: Mapping[str, str] = field(default_factory=dict)  # Further options of FFmpeg's
    device: str = "cpu"  # Where the engine wants its frames, "cpu" or "cuda:N"
    # Whether a video of several frames begins again at its end; its times go on
    loops: bool = False

    @property
    def live(self) -> bool:
        return self.kind != "file"

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Decode packet by packet: one that is damaged costs itself alone."""
        av, times, goes_on = import_av(), None, True
        while goes_on:
            num_frames = 0
            with ExitStack() as parts:
                try:
                    opened = self._opened(av, parts)
                except av.FFmpegError as exc:
                    raise self._error(exc) from None  # its text holds the password
                times = times or opened.times
                with closing(self._read(av, opened, reader, times)) as pictures:
                    for picture in pictures:
                        num_frames += 1
                        yield picture
            if not (self.live or num_frames):
                raise SourceError(f"{self.name}: expected a video, decoded no frame. Is it whole?")
            if times is not None:
                times.begin_again()
            is_still = self.live and opened.is_image and num_frames == 1
            goes_on = is_still or (self.loops and num_frames > 1)
            if goes_on and reader.wait(STILL_EVERY if is_still else 0.0):
                return
        if self.live:
            raise SourceError(f"{self.name}: the camera's stream ended. Check that it is on.")

    def _opened(self, av: Any, parts: ExitStack) -> _Opened:
        """Open it; ``parts`` close it, and containers last: they hold packets and frames."""
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
        """Read MJPEG by its images, which FFmpeg is too strict and slow for; None: it is none."""
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
            options["format_whitelist"] = ",".join(sorted(av.formats_available - _PLAYLISTS))
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
                    due = None if frame.dts is None else float(frame.dts * frame.time_base)
                    stamp = times.of(frame.time, due)
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

    def _error(self, error: Any) -> SourceError:
        """An error of FFmpeg's in our words; FFmpeg's own hold the address with its password."""
        what, remedies = type(error).__name__, dict(_REMEDIES)
        if self.kind in ("http", "rtsp"):
            if error.errno == errno.EIO and (reason := why_unreachable(self.url)):  # unknown host
                return SourceError(f"{self.name}: cannot be read: {reason}. Check the address.")
            remedies |= _NETWORK_REMEDIES
        remedy = remedies.get(what, "Check it with ffprobe or another player.")
        if self.kind == "http" and what == "InvalidDataError":
            remedy = NO_STREAM
        status = re.search(r"\b[45]\d\d\b", error.strerror or "")
        if self.kind in ("http", "rtsp") and status is not None:
            remedy = answer_remedy(status[0], self.url)
        if self.kind == "v4l2":
            remedy = _DEVICE_REMEDIES.get(error.errno or 0, remedy)
        reason = error.strerror or what
        return SourceError(f"{self.name}: cannot be read: {reason}. {remedy}")


def _bytes_of(packets: Iterable[Any]) -> Iterator[bytes]:
    """The bytes of a connection until it ends: an error of FFmpeg where no length is told."""
    try:
        yield from map(bytes, packets)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise


def capture_time(
    kind: VideoKind, stamp: float | None, arrived_at: float
) -> tuple[float, Literal["driver", "arrival", "file"]]:
    """When a frame was captured, and whose clock says so."""
    if kind == "file":
        return arrived_at, "file"
    # Drivers of V4L2 stamp frames with CLOCK_MONOTONIC, which is time.monotonic().
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
    """The images in a camera's bytes, by their own structure: no boundary is needed."""
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
