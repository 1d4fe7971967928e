"""Clients that are many, slow or odd: of the RTSP server, and of the HTTP server."""

from __future__ import annotations

import base64
import contextlib
import random
import select
import socket
import time
from pathlib import Path

import numpy as np

from tools.torture.damage import spoil_bytes
from tools.torture.target import Attempt, RefusedError, target
from tools.torture.targets.bundles import CONFIG

_PATIENCE = 20.0  # seconds for an answer
_SOUND = b"OPTIONS rtsp://127.0.0.1/seg RTSP/1.0\r\nCSeq: 1\r\n\r\n"
_COOKIE = b"x-sessioncookie: abc\r\n\r\n"
_RTSP = (
    _SOUND,
    b"DESCRIBE rtsp://127.0.0.1/seg RTSP/1.0\r\nCSeq: 2\r\nAccept: application/sdp\r\n\r\n",
    b"SETUP rtsp://127.0.0.1/seg/stream=0 RTSP/1.0\r\nCSeq: 3\r\n"
    b"Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n",
    b"SET_PARAMETER rtsp://127.0.0.1/seg RTSP/1.0\r\nCSeq: 4\r\nContent-Length: 3\r\n\r\na:b",
    b"DESCRIBE rtsp://127.0.0.1/seg RTSP/1.0\r\nCSeq: 5\r\nContent-Length: 999999999\r\n\r\n",
    b"GET /seg HTTP/1.0\r\n" + _COOKIE,
    b"POST /seg HTTP/1.0\r\nContent-Length: 32767\r\n" + _COOKIE + base64.b64encode(_SOUND),
    b"$\0\xff\xff" + bytes(300),
)


def can_serve() -> bool:
    """Whether GStreamer's RTSP server is here."""
    from zsseg_rt.errors import BackendUnavailableError
    from zsseg_rt.stream.gstreamer.library import load_server

    try:
        load_server()
    except BackendUnavailableError:
        return False
    return True


@target("rtsp-clients", "bytes sent to the RTSP output: requests, bodies, tunnels", group="rtsp")
def _rtsp_clients(_: Path) -> Attempt:
    from zsseg_rt.results.segmentation import Frame, Segmentation
    from zsseg_rt.stream.gstreamer.rtsp_sink import RtspSink
    from zsseg_rt.stream.painting import Painter
    from zsseg_rt.stream.writers import Tags

    painter = Painter(channel_order="rgb", alpha=0.5)
    sink = RtspSink("rtsp://@127.0.0.1:0/seg", painter=painter, tags=Tags())
    image = np.zeros((48, 64, 3), np.uint8)
    frame = Frame(source="a", index=0, captured_at=0.0, clock="arrival", image=image)
    labels = np.zeros((48, 64), np.uint8)
    seg = Segmentation(labels=labels, names=("a",), vocabulary_version=1, times={}, frame=frame)

    def attempt(draw: random.Random) -> None:
        sink.write(seg)
        request = b"".join(draw.choice(_RTSP) for _ in range(draw.choice((1, 1, 2, 5))))
        if draw.random() < 0.7:
            request = spoil_bytes(request, draw)
        request += draw.choice((b"", b"", b"", b"a:b\r\n" * 40_000, bytes(200_000)))
        with contextlib.ExitStack() as stack:
            for _ in range(draw.choice((1, 1, 1, 50))):
                _send(stack, sink.port, request)
        last = time.monotonic() + _PATIENCE
        while not _answer(sink.port, _SOUND).startswith(b"RTSP/1.0 200"):
            if time.monotonic() > last:
                raise AssertionError(f"the server is not well after {request[:300]!r}")
            time.sleep(0.05)

    return attempt


_HTTP = (
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost/healthz?strict=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40000000\r\n"
    b"Connection: close\r\n\r\n",
    b"PUT /v1/settings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 22\r\n"
    b'Content-Type: application/json\r\n\r\n{"unknown_below": 0.2}',
    b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    b"GET / HTTP/1.1\r\nX-Slow: ",
)


@target("http-clients", "many connections to the server, pipelined, slow or cut", group="server")
def _http_clients(_: Path) -> Attempt:
    from zsseg_rt import Bundle, Engine
    from zsseg_rt.server import LiveServer, ServerSettings

    engine = Engine(Bundle.demo("scenes"), CONFIG)
    engine.set_classes(["red ball", "blue sky"])
    server = LiveServer(engine, "test://?size=64x48&rate=5", ServerSettings(port=0))
    server.__enter__()

    def attempt(draw: random.Random) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(draw.choice((1, 5, 40, 150))):
                request = b"".join(draw.choice(_HTTP) for _ in range(draw.choice((1, 1, 2, 9))))
                _send(stack, server.port, request + draw.choice((b"", b"", bytes(100_000))))
            status = _answer(server.port, _HTTP[0])[9:12]
        if status not in (b"200", b"503"):
            raise AssertionError(f"the health was answered with {status!r}")
        if status == b"503":
            raise RefusedError("not healthy")

    return attempt


def _send(stack: contextlib.ExitStack, port: int, request: bytes) -> None:
    """Send what is taken at once, and leave the connection open for the case."""
    with contextlib.suppress(ConnectionError):
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), _PATIENCE))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.send(request)
            select.select([client], [], [], 0.01)


def _answer(port: int, request: bytes) -> bytes:
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), _PATIENCE) as client,
    ):
        client.sendall(request)
        return client.recv(4096)
    return b""
