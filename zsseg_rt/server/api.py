"""The server's answers to HTTP requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from email import message_from_bytes
from email.message import Message
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from zsseg_rt import __version__
from zsseg_rt.errors import ArgumentError, SourceError, VocabularyError, ZssegError
from zsseg_rt.photos import pixels_of
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.server.access import PROTOCOL, Json
from zsseg_rt.server.hub import (
    CONTENT_TYPE,
    Hub,
    Result,
    Worker,
    encode_message,
    encode_overlay,
    write_metrics,
)
from zsseg_rt.server.labeller import Labeller

VERSION_HEADER = "X-Vocabulary-Version"  # of the classes that an image's labels are of
FRAME = "application/x-zsseg-frame"  # asks for a picture as the WebSocket sends frames
_FORMS = ("application/json", "image/png", "image/jpeg", FRAME)


def picture_in(body: bytes, content_type: str) -> bytes:
    """The picture of a request: its body, or the first file of a form (RFC 7578)."""
    described = Message()
    described["content-type"] = content_type
    if described.get_content_type() != "multipart/form-data":
        return body
    boundary = described.get_boundary("").encode("latin-1", "replace")
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        field = message_from_bytes(head.lstrip())
        if field.get_filename() is not None or field.get_content_maintype() == "image":
            return content
    raise SourceError(
        "body: expected a form with a file, got one without. Send it as curl -F image=@PHOTO does, "
        "or the photo alone as the body."
    )


def answer_picture(labeller: Labeller, content: bytes, accept: str) -> Response:
    """Label a picture."""
    most = labeller.limits.picture_pixels
    if pixels_of(content, "image") > most:
        raise HTTPException(413, f"image: expected at most {most} pixels, got more. Shrink it.")
    image, seg = labeller.segment_picture(content)
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    wanted = next((kind for kind in kinds if kind in _FORMS), _FORMS[0])
    headers = {VERSION_HEADER: str(seg.vocabulary_version)}
    if wanted == FRAME:
        now = time.monotonic()
        frame = Frame(source="", index=0, image=image, captured_at=now, clock="arrival")
        message = encode_message(0, replace(seg, frame=frame), labeller.channel_order, now)
        return Response(message.pack(round(1e3 * now, 3)), media_type=wanted, headers=headers)
    if wanted == "application/json":
        return Json(_describe(seg), headers=headers)
    if wanted == "image/png":
        content = encode_label_png(seg.labels, palette(seg.names))
    else:
        content = encode_overlay(image, seg.labels, seg.names, labeller.channel_order)
    return Response(content, media_type=wanted, headers=headers)


def _describe(seg: Segmentation) -> dict[str, Any]:
    height, width = seg.labels.shape
    shares = seg.present()
    return {
        "width": width,
        "height": height,
        "classes": [
            {"name": one.name, "label": one.index, "pixels": one.pixels, "share": one.share}
            for one in shares
        ],
        "unknown_share": 1.0 - sum(one.pixels for one in shares) / seg.labels.size,
        "vocabulary_version": seg.vocabulary_version,
        "times_ms": dict(seg.times),
    }


_log = logging.getLogger(__name__)

_KINDS = {
    404: "NotFoundError", 405: "MethodError", 408: "TimeoutError", 413: "SizeError",
    503: "BusyError",
}  # fmt: skip
_BINARY = {"type": "string", "format": "binary"}
_PICTURE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _BINARY},
            "multipart/form-data": {"schema": {"type": "object", "properties": {"file": _BINARY}}},
        },
    }
}


class NewVocabulary(BaseModel):
    """Classes to look for: each a name, or a list of synonyms whose first is the name.

    ``background`` is a list of phrases whose pixels become unknown, or ``"auto"``, which chooses
    them; without it, a bundle with a background of its own takes ``"auto"``, others none.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    classes: list[str | list[str]]
    background: Annotated[str | list[str], Field(default=None)]


class Settings(BaseModel):
    """The settings that can change while the stream runs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    unknown_below: Annotated[float, Field(description="Score below which a pixel is unknown.")]


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str
    message: str
    unknown: list[str] | None = None  # names, where a name is what is wrong


def create_app(hub: Hub, *, stale_seconds: float) -> FastAPI:
    """The application that answers requests."""
    app = FastAPI(
        title="zsseg_rt",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
        responses={"4XX": {"model": Problem}, 503: {"model": Problem}},
    )
    _answer_problems(app)
    _serve_page(app, hub, stale_seconds)
    _serve_vocabulary(app, hub)
    _serve_pictures(app, hub)
    return app


def _serve_page(app: FastAPI, hub: Hub, stale_seconds: float) -> None:
    html, policy = load_page()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        await socket.accept(PROTOCOL if PROTOCOL in offered else None)
        await watch(socket, hub)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz(request: Request, strict: bool = False) -> Response:
        """Whether frames are labelled: 200 if so, else 503 with the reason.

        With ``strict`` it is 503, too, when any source gives none.
        """
        names = request.state.shows_token
        is_well, content = describe_health(hub, stale_seconds, strict=strict, with_names=names)
        return Json(content, 200 if is_well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(write_metrics(hub), media_type=CONTENT_TYPE)


def _serve_vocabulary(app: FastAPI, hub: Hub) -> None:
    worker, places = Worker(), asyncio.Semaphore(hub.limits.changes)
    labeller = hub.labeller

    @app.get("/v1/vocabulary")
    async def get_vocabulary() -> dict[str, Any]:
        """The classes in force; a class's label is its position."""
        return hub.vocabulary

    @app.put("/v1/vocabulary")
    async def put_vocabulary(new: NewVocabulary) -> dict[str, Any]:
        """Look for other classes, from the next frame on."""
        async with _free(places):
            mine = await worker.run(lambda: labeller.set_classes(new.classes, new.background))
        hub.tell_vocabulary()
        return labeller.describe(mine)

    @app.get("/v1/names")
    async def get_names() -> dict[str, Any]:
        """Names and words that the bundle knows, to choose from; others may work, too."""
        return {"names": labeller.known_names, "words": labeller.known_words}

    @app.get("/v1/settings")
    async def get_settings() -> Settings:
        """The settings that can change while the stream runs."""
        return Settings(unknown_below=labeller.unknown_below)

    @app.put("/v1/settings")
    async def put_settings(new: Settings) -> Settings:
        """Change settings, from the next frame on."""
        labeller.set_unknown_below(new.unknown_below)
        hub.tell_vocabulary()
        return new


def _serve_pictures(app: FastAPI, hub: Hub) -> None:
    worker, places = Worker(), asyncio.Semaphore(hub.limits.pictures)

    @app.post("/v1/segment", openapi_extra=_PICTURE_BODY)
    async def segment(request: Request) -> Response:
        """Label a picture: classes as JSON, or what the header Accept asks for.

        The body is the picture, or a form whose first file it is, in a field of any name.
        ``Accept: image/png`` gets the labels, ``Accept: image/jpeg`` the overlay.
        """
        async with _free(places):
            kind = request.headers.get("content-type", "")
            content = picture_in(await request.body(), kind)
            accept = request.headers.get("accept", "")
            answer = await worker.run(lambda: answer_picture(hub.labeller, content, accept))
        hub.counts["pictures"] += 1
        return answer

    @app.get("/stream.mjpg")
    async def motion_jpeg(source: str | None = None) -> Response:
        """The overlay as Motion JPEG, always the newest frame; of all sources, or of one."""
        return MotionJpeg(hub, hub.check_source(source))


def _free(places: asyncio.Semaphore) -> asyncio.Semaphore:
    if places.locked():
        raise _busy("engine: expected fewer requests at a time. Try again after a second.")
    return places


def _busy(message: str) -> HTTPException:
    return HTTPException(503, message, {"retry-after": "1"})


def _answer_problems(app: FastAPI) -> None:
    async def answer(_: Request, exc: Exception) -> Response:
        return _answer_to(exc)

    for kind in (HTTPException, RequestValidationError, ZssegError, ClientDisconnect):
        app.exception_handler(kind)(answer)

    @app.exception_handler(Exception)
    async def of_defect(_: Request, __: Exception) -> Response:
        # It is raised again after this answer, and uvicorn logs it with its traceback.
        return problem(500, "InternalError", "The server failed; see its log.")


def _answer_to(exc: Exception) -> Response:
    if isinstance(exc, HTTPException):
        kind = _KINDS.get(exc.status_code, "RequestError")
        detail = exc.detail if exc.status_code in (400, 408, 413, 503) else ""
        text = detail or HTTPStatus(exc.status_code).phrase
        return problem(exc.status_code, kind, text, exc.headers)
    if isinstance(exc, RequestValidationError):
        first = exc.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        if first["loc"] == ("body",):
            text = "body: expected a JSON object, and the header Content-Type: application/json"
        return problem(422, "RequestError", text)
    if isinstance(exc, (VocabularyError, ArgumentError, SourceError)):
        unknown = list(getattr(exc, "unknown", ()))
        content = {"error": type(exc).__name__, "message": str(exc)}
        return Json({**content, "unknown": unknown} if unknown else content, 422)
    if isinstance(exc, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    _log.error("%s", exc)
    return problem(500, type(exc).__name__, "The engine failed; see the server's log.")


def problem(status: int, kind: str, message: str, headers: Any = None) -> Json:
    """An answer that says why a request failed."""
    return Json({"error": kind, "message": message}, status, headers)


def describe_health(
    hub: Hub, stale_seconds: float, *, strict: bool, with_names: bool
) -> tuple[bool, dict[str, Any]]:
    """Whether the server does its work, and why not; a recording that ended is not dead."""
    sources: list[dict[str, Any]] = []
    silences = hub.silences()
    for number, (name, stats) in enumerate(hub.stream.stats().items(), 1):
        since = silences[name]
        has_ended = stats.state == "ended" and stats.error is None
        sources.append({
            "source": name if with_names else number,
            "state": stats.state,
            "seconds_since_frame": since and round(since, 3),
            "dead": (since is None or since > stale_seconds) and not has_ended,
        })  # fmt: skip
    newest = min((one for one in silences.values() if one is not None), default=None)
    reason = None
    if newest is None:
        reason = "no frame has been labelled yet"
    elif newest > stale_seconds:
        reason = f"no frame was labelled for {newest:.0f} s"
    dead = sum(source["dead"] for source in sources)
    is_well = reason is None and not (strict and dead)
    if reason is None and dead:
        reason = f"{dead} of {len(sources)} sources give no frames"
    return is_well, {
        "status": "failing" if not is_well else "degraded" if dead else "ok",
        "reason": reason,
        "seconds_since_frame": newest and round(newest, 3),
        "sources": sources,
    }


_BOUNDARY = "frame"


class MotionJpeg(StreamingResponse):
    """Sends the newest frame whenever the client has taken the one before."""

    def __init__(self, hub: Hub, source: str | None) -> None:
        kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        super().__init__(_parts(hub, source), media_type=kind)
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless as many clients have it as may: checked and counted in one step."""
        with _seat(self._hub, "motion_jpegs", self._hub.limits.motion_jpegs):
            await super().__call__(scope, receive, send)


@contextlib.contextmanager
def _seat(hub: Hub, kind: str, most: int) -> Iterator[None]:
    if hub.watchers[kind] >= most:
        raise _busy(f"{kind}: expected fewer clients at a time. Close another.")
    hub.watchers[kind] += 1
    try:
        yield
    finally:
        hub.watchers[kind] -= 1


async def _parts(hub: Hub, source: str | None) -> AsyncIterator[bytes]:
    sent: dict[str, int] = {}
    news = hub.news()
    try:
        yield f"--{_BOUNDARY}\r\n".encode()
        while not hub.is_closed:
            result = hub.newest(source, sent)
            if result is None:
                await news.wait()
                news.clear()
                continue
            sent[result.source] = result.number
            jpeg = await result.overlay()
            # Players show a part when they see the boundary after it.
            head = (
                f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n"
                f"{VERSION_HEADER}: {result.seg.vocabulary_version}\r\n\r\n"
            )
            yield b"".join((head.encode(), jpeg, f"\r\n--{_BOUNDARY}\r\n".encode()))
    finally:
        hub.leave(news)


def load_page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: its own script and style run, nothing else."""
    html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return html, (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


GOING_AWAY, POLICY, TOO_MANY = 1001, 1008, 4429
_BETWEEN = 0.005  # seconds between a viewer's messages, however fast they come
_LOOK = 0.5  # seconds; how much later than it should a viewer is dropped at most
_GOODBYE = 0.5  # seconds that a client gets to take a closing message


async def watch(socket: WebSocket, hub: Hub) -> None:
    """Serve a viewer until it or the server goes."""
    try:
        with _seat(hub, "viewers", hub.limits.viewers):
            await _Viewer(socket, hub).run()
    except HTTPException:
        await socket.close(TOO_MANY, "too many viewers")


class _Viewer:
    def __init__(self, socket: WebSocket, hub: Hub) -> None:
        self._socket, self._hub = socket, hub
        self._news = hub.news()
        self._source: str | None = None
        self._sent: dict[str, int] = {}
        self._unacknowledged: int | None = None
        self._sent_at = 0.0
        self._vocabulary: dict[str, Any] = {}
        self._state_number = 0
        self._answers: dict[str, dict[str, Any]] = {}  # the newest of each type: no queue grows

    async def run(self) -> None:
        works = (self._listen, self._talk, self._wait_until_late)
        tasks = [asyncio.create_task(work()) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        finally:
            self._hub.leave(self._news)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._is_late():
            self._hub.counts["viewers_dropped"] += 1
            await self._close(POLICY, "a frame was not acknowledged in time")
        elif self._hub.is_closed:
            await self._close(GOING_AWAY, "the server stops")

    async def _close(self, code: int, reason: str) -> None:
        """Close, unless the client has gone or takes no bytes; the connection is cut then."""
        with contextlib.suppress(asyncio.TimeoutError, RuntimeError, WebSocketDisconnect):
            await asyncio.wait_for(self._socket.close(code, reason), _GOODBYE)

    async def _listen(self) -> None:
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            try:
                self._hear(_message(event))
            except ValueError as exc:
                self._answers["error"] = {"type": "error", "message": str(exc)}
            self._news.set()
            await asyncio.sleep(_BETWEEN)

    def _hear(self, message: Mapping[str, Any]) -> None:
        kind = message.get("type")
        if kind == "ack":
            if message.get("id") == self._unacknowledged:
                self._unacknowledged = None
        elif kind == "ping":
            self._answers["pong"] = {"type": "pong", "t": message.get("t")}
        elif kind == "watch":
            self._source = self._hub.check_source(message.get("source"))
        else:
            raise ValueError("type: expected ack, ping or watch. See docs/serve.md.")

    async def _talk(self) -> None:
        while not self._hub.is_closed:
            await self._send_news()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), _LOOK)
            self._news.clear()

    async def _wait_until_late(self) -> None:
        # Apart from _talk, which waits for as long as the connection takes no bytes.
        while not self._is_late():
            await asyncio.sleep(_LOOK)

    def _is_late(self) -> bool:
        waited = time.monotonic() - self._sent_at
        return self._unacknowledged is not None and waited > self._hub.limits.ack_seconds

    async def _send_news(self) -> None:
        if self._is_behind():
            await self._send_vocabulary(self._hub.vocabulary)
        if self._state_number != self._hub.state_number:
            self._state_number = self._hub.state_number
            await self._send_json(self._hub.state)
        while self._answers:
            _, answer = self._answers.popitem()
            if answer["type"] == "pong":
                answer["server_ms"] = _now_ms()
            await self._send_json(answer)
        if self._unacknowledged is None:
            result = self._hub.newest(self._source, self._sent)
            if result is not None:
                await self._send_frame(result)

    async def _send_frame(self, result: Result) -> None:
        self._sent[result.source] = result.number
        if result.seg.vocabulary_version > self._hub.vocabulary["version"]:
            self._hub.tell_vocabulary()
        if result.seg.vocabulary_version != self._vocabulary["version"]:
            theirs = self._hub.labeller.describe_version(result.seg.vocabulary_version)
            if theirs is None:
                return  # of classes that were replaced long ago; a newer frame follows
            await self._send_vocabulary(theirs)
        message = await result.message()
        self._unacknowledged, self._sent_at = result.number, time.monotonic()
        data = message.pack(_now_ms())
        await self._socket.send_bytes(data)
        self._hub.counts["frames_sent"] += 1
        self._hub.counts["bytes_sent"] += len(data)

    def _is_behind(self) -> bool:
        """Whether the viewer hears of new classes now; others come with their first frame."""
        old, new = self._vocabulary, self._hub.vocabulary
        if old and old["version"] == new["version"]:
            return bool(old["unknown_below"] != new["unknown_below"])
        return not old or time.monotonic() - self._sent_at > _LOOK

    async def _send_vocabulary(self, vocabulary: dict[str, Any]) -> None:
        self._vocabulary = vocabulary
        await self._send_json({"type": "vocabulary", **vocabulary})

    async def _send_json(self, message: Mapping[str, Any]) -> None:
        await self._socket.send_text(json.dumps(message, separators=(",", ":")))


def _message(event: Mapping[str, Any]) -> dict[str, Any]:
    try:
        message = json.loads(event.get("text") or "")
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ValueError("message: expected a JSON object as text. See docs/serve.md.")
    return message


def _now_ms() -> float:
    return round(time.monotonic() * 1000.0, 3)
