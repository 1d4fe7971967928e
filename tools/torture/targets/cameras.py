"""Cameras that answer what no camera should."""

from __future__ import annotations

import itertools
import random
import socket
import threading
from contextlib import closing
from pathlib import Path

import av
import numpy as np

from tools.torture.damage import spoil_bytes
from tools.torture.target import Attempt, target, test_support
from zsseg_rt.stream.uris import open_sources

_LENGTHS = (-1, 0, 1, 7, 2**31 - 1, 2**31, 2**63, 2_000_000_000, 10**30)
_SIDES = (0, 1, 255, 4096, 16384, 65535)
_PLAYLISTS = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile %s\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=%s\nm=video 5004 RTP/AVP 96\n",
)
_ENOUGH = 2  # frames; a camera that ends later is refused for its end
_FOLLOWS = int(av.__version__.split(".")[0]) < 18  # FFmpeg before 8.1 cannot be kept from it


class _Answers:
    """A server that gives each connection the same bytes, then cuts it."""

    def __init__(self) -> None:
        self.answer, self.asked = b"", 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = b"127.0.0.1:%d" % self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.asked += 1
            with connection:
                try:
                    connection.settimeout(5.0)
                    connection.recv(65536)
                    connection.sendall(self.answer)
                except OSError:
                    continue


@target(
    "cameras",
    "HTTP cameras: odd lengths, redirects, cut and damaged parts, huge pictures, playlists",
    group="stream",
)
def _cameras(folder: Path) -> Attempt:
    camera, inside = _Answers(), _Answers()
    write_video = test_support("streams").write_video
    images = [np.full((48, 64, 3), n * 9, np.uint8) for n in range(12)]
    streams = [write_video(folder / f"a.{kind}", images).read_bytes() for kind in ("ts", "mp4")]
    reader = test_support("streams").ReaderNow

    def attempt(draw: random.Random) -> None:
        camera.answer = _answer(draw, streams, inside.address)
        before = inside.asked
        (source,) = open_sources(f"http://me:secret@{camera.address.decode()}/video")
        try:
            with closing(source.pictures(reader())) as frames:
                for _ in itertools.islice(frames, _ENOUGH):
                    pass
        finally:
            if inside.asked > before and not _FOLLOWS:
                raise AssertionError("a camera led to another address")

    return attempt


def _answer(draw: random.Random, streams: list[bytes], elsewhere: bytes) -> bytes:
    address = b"http://%s/x" % elsewhere
    if draw.random() < 0.1:
        code = draw.choice((300, 301, 302, 303, 307, 308, 399))
        return b"HTTP/1.1 %d Found\r\nLocation: %s\r\n\r\n" % (code, address)
    kind, body = b"multipart/x-mixed-replace; boundary=f", _parts(draw)
    if draw.random() < 0.3:
        kind, body = b"video/mp2t", draw.choice(streams)
    if draw.random() < 0.1:
        kind, body = b"application/vnd.apple.mpegurl", draw.choice(_PLAYLISTS) % address
    head = b"HTTP/1.%d %d OK\r\nContent-Type: %s\r\n" % (
        draw.randrange(2), draw.choice((200, 200, 200, 206, 404)), kind,
    )  # fmt: skip
    if draw.random() < 0.3:
        head += b"Content-Length: %d\r\n" % draw.choice((*_LENGTHS, len(body), len(body) // 2))
    if draw.random() < 0.2:
        head += b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n%s\r\n" % (max(draw.choice((*_LENGTHS, len(body))), 0), body)
    answer = head + b"\r\n" + body
    answer = spoil_bytes(answer, draw) if draw.random() < 0.3 else answer
    return answer[: draw.randrange(len(answer) + 1)] if draw.random() < 0.2 else answer


def _parts(draw: random.Random) -> bytes:
    parts = []
    for number in range(draw.randrange(1, 12)):
        jpeg = _jpeg(number, draw)
        length = draw.choice(_LENGTHS) if draw.random() < 0.1 else len(jpeg)
        boundary = draw.choice((b"--f", b"--f", b"--f", b"f", b"--other", b""))
        part = b"%s\r\nContent-Type: image/jpeg\r\n" % boundary
        part += b"Content-Length: %d\r\n" % length if draw.random() < 0.8 else b""
        parts.append(part + b"\r\n" + jpeg + draw.choice((b"\r\n", b"\r\n", b"", b"\n")))
    return b"".join(parts)


def _jpeg(number: int, draw: random.Random) -> bytes:
    import cv2

    size = draw.choice(((48, 64), (1, 1), (7, 161), (540, 3)))
    jpeg = bytearray(cv2.imencode(".jpg", np.full((*size, 3), number * 9, np.uint8))[1])
    if draw.random() < 0.1:
        place = jpeg.index(b"\xff\xc0") + 5
        for at in (place, place + 2):
            jpeg[at : at + 2] = draw.choice(_SIDES).to_bytes(2, "big")
    return spoil_bytes(bytes(jpeg), draw) if draw.random() < 0.1 else bytes(jpeg)
