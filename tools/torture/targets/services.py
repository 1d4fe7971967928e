"""Input from outside: command lines, environment, addresses of cameras, HTTP, WebSockets."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from tools.torture.damage import odd_text, spoil_bytes, spoil_json
from tools.torture.target import Attempt, RefusedError, target
from tools.torture.targets.bundles import CONFIG
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.stream.uris import open_sources

_PATIENCE = 20.0  # seconds for an answer


@target("uris", "addresses of cameras, videos and lists of them; nothing is opened")
def _uris(folder: Path) -> Attempt:
    sound = ("rtsp://u:p@10.0.0.1:554/a?b=c", "v4l2:///dev/video0", "csi://0?size=640x480", "0",
             "test://?size=320x240&rate=30", "http://h/x.mjpg", "gst:videotestsrc ! appsink",
             "gst-file:filesrc ! fakesink", "@list.txt", "a.mp4", "file:///a.mp4")  # fmt: skip
    (folder / "list.txt").write_text("test://\n0\n")

    def attempt(draw: random.Random) -> None:
        text = draw.choice(sound)
        for _ in range(draw.randrange(4)):
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice((odd_text(draw)[:40], "?", "=", "&", ":", "@", "%00"))
            text += draw.choice(sound)[place:] if draw.random() < 0.5 else ""
        if draw.random() < 0.2:
            (folder / "list.txt").write_bytes(spoil_bytes(b"test://\n0\nrtsp://a/b\n", draw))
            text = f"@{folder / 'list.txt'}"
        open_sources(text)

    return attempt


_COMMANDS = tuple(
    tuple(line.split("|"))
    for line in """\
segment|in|--demo|scenes|--out|out|--classes|red ball, blue sky
segment|in/a.png|--demo|scenes|--out|out|--class|red ball|--json|r.json
segment|--demo|scenes|--out|out|--resume|--overlay-format|jpg|--legend
info|demo.zsseg|--check
doctor|--json
profile|show|profile.json
export|dense|e.onnx|--size|64|--mean|clip|--out|x.zsseg
evaluate|demo.zsseg|--dataset|folder|--root|in|--json|e.json
stream|test://?size=64x48|--demo|scenes|--frames|2|l.jsonl
""".splitlines()
)
_INERT = ("--help", "--version", "--install-completion", "--show-completion")


@target(
    "arguments",
    "command lines: odd, missing, repeated and swapped words, bytes that are no UTF-8",
    weight=2,
)
def _arguments(folder: Path) -> Attempt:
    from PIL import Image

    from zsseg_rt import cli

    (folder / "in").mkdir(exist_ok=True)
    Image.new("RGB", (16, 12), (200, 30, 30)).save(folder / "in" / "a.png")
    with contextlib.suppress(FileExistsError):
        (folder / "demo.zsseg").symlink_to(Bundle.demo("scenes").path)
    (folder / "profile.json").write_text("{}")

    def attempt(draw: random.Random) -> None:
        words = _odd_words(draw)
        with _within(folder), _terminal() as errors:
            code = cli.main(words)
        complained = errors.getvalue().decode()
        if code not in (0, 1, 2, 3, 4):
            raise AssertionError(f"{words}: exit code {code}")
        if "Traceback" in complained:
            raise AssertionError(f"{words}: {complained[-400:]}")
        if code:
            if not complained.strip():
                raise AssertionError(f"{words}: exit code {code} without a word")
            raise RefusedError(complained[-200:])

    return attempt


@contextlib.contextmanager
def _terminal() -> Iterator[io.BytesIO]:
    """Streams as Python makes them for a terminal, which print no text that is no UTF-8."""
    said, errors = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(said, "utf-8")
    error = io.TextIOWrapper(errors, "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield errors
        out.flush()
        error.flush()


def _odd_words(draw: random.Random) -> list[str]:
    """A command line; no word of it leads out of the folder, and none waits for ever."""
    words = list(draw.choice(_COMMANDS))
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, kind = draw.randrange(1, len(words) + 1), draw.randrange(5)
        if kind == 0:
            words.insert(place, _odd_word(draw))
        elif kind == 1 and place < len(words):
            words[place] = _odd_word(draw)
        elif kind == 2 and place < len(words):
            del words[place]
        elif kind == 3:
            words.insert(place, draw.choice([w for command in _COMMANDS for w in command[1:]]))
        elif len(words) > 2:
            other = draw.randrange(1, len(words))
            words[place - 1], words[other] = words[other], words[place - 1]
    inert = [w for w in words if w not in _INERT and not _leads_out(w)]
    if "stream" in inert:  # without a limit it goes on for ever
        inert = [w for w in inert if w not in ("--frames", "2")]
        inert += ["--frames", "2", "--seconds", "5"]
    return inert


def _odd_word(draw: random.Random) -> str:
    """A word as ``sys.argv`` holds it, also one whose bytes are no UTF-8."""
    if draw.random() < 0.3:
        sound = draw.choice(("in", "café", "red ball", "--out=x", "")).encode()
        return os.fsdecode(spoil_bytes(sound, draw).replace(b"\0", b"\xff"))
    return odd_text(draw)[:300]


def _leads_out(word: str) -> bool:
    return "/" in word.replace("in/a.png", "").replace("://", "")


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@target("environment", "the variables that the package reads")
def _environment(folder: Path) -> Attempt:
    from zsseg_rt.doctor import examine

    names = ("ZSSEG_HOME", "ZSSEG_DEVICE", "ZSSEG_BACKEND", "ZSSEG_TENSORRT", "ZSSEG_RTSP_LIBRARY",
             "COLUMNS")  # fmt: skip

    def attempt(draw: random.Random) -> None:
        before = dict(os.environ)
        for name in draw.sample(names, draw.choice((1, 1, 2))):
            value = draw.choice((odd_text(draw), "0", "cpu", "cuda:9", str(folder), "99999999999"))
            os.environ[name] = value.replace("\0", "").encode("utf-8", "replace").decode()
        try:
            open_sources("rtsp://a/b")
            with Engine(Bundle.demo("scenes"), EngineConfig(num_threads=1)) as engine:
                engine.set_classes(["red ball"])
            if draw.random() < 0.1:
                examine()
        finally:
            os.environ.clear()
            os.environ.update(before)

    return attempt


_REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nAccept: */*\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: localhost:{}\r\nOrigin: http://localhost:{}\r\n\r\n",
    b"GET /v1/live HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x02{}",
)


def _body(path: str, method: str, kind: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{{}}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@target("requests", "bytes sent to the server: heads, bodies, WebSocket frames", group="server")
def _requests(_: Path) -> Attempt:
    from zsseg_rt.server import Limits, LiveServer, ServerSettings

    engine = Engine(Bundle.demo("scenes"), CONFIG)
    engine.set_classes(["red ball", "blue sky"])
    limits = Limits()
    server = LiveServer(engine, "test://?size=64x48&rate=5", ServerSettings(port=0, limits=limits))
    server.__enter__()
    sound = _REQUESTS[1].replace(b"{}", str(server.port).encode())
    names = {"classes": ["red ball", ["blue sky", "sky"]], "background": []}

    def attempt(draw: random.Random) -> None:
        kind = draw.randrange(3)
        if kind == 0:
            request = draw.choice(_REQUESTS)
        elif kind == 1:
            request = _body("/v1/vocabulary", "PUT", "application/json", spoil_json(names, draw))
        else:
            request = _body("/v1/segment", "POST", "image/png", spoil_bytes(_PICTURE, draw))
        request = request.replace(b"{}", str(server.port).encode())
        if draw.random() < 0.6:
            request = spoil_bytes(request, draw)
        status = _ask(server.port, request)
        if status >= 500 and status != 503:
            raise AssertionError(f"status {status} for {request[:300]!r}")
        if _ask(server.port, sound, patience=_PATIENCE, is_over=False) not in (200, 503):
            raise AssertionError(f"the server is not well after {request[:300]!r}")
        if status >= 400:
            raise RefusedError(f"status {status}")

    return attempt


def _ask(port: int, request: bytes, *, patience: float = 1.0, is_over: bool = True) -> int:
    """The status of the answer; 0 if the server closed without one, or waits for more.

    A client whose own end is over may get no answer: asyncio closes at its EOF.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as client:
        client.settimeout(patience)
        answer = b""
        with contextlib.suppress(OSError):
            client.sendall(request)
            if is_over:
                client.shutdown(socket.SHUT_WR)
            while b"\r\n" not in answer and (part := client.recv(4096)):
                answer += part
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def _small_picture() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 30, 30)).save(stream, "png")
    return stream.getvalue()


_PICTURE = _small_picture()
