"""What stands before the application: access, limits on bodies, headers that protect browsers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zsseg_rt.common.schema import json_text
from zsseg_rt.server.access import AccessRules, Refused
from zsseg_rt.server.settings import Limits

PROTOCOL = "zsseg.v1"
"""Subprotocol of the WebSocket."""

_OPEN_PATHS = ("/", "/healthz")
_TOKEN_IN_QUERY = ("/stream.mjpg",)  # for players, which cannot send headers
_SAFE = ("GET", "HEAD")
_ABSOLUTE = re.compile(rb"(?:http|ws)s?://([^/]*)(/.*)?", re.IGNORECASE | re.DOTALL)
_PROTECTION = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Json(JSONResponse):
    """JSON whose names trip up no reader of lines, log or terminal."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_text(content, separators=(",", ":"), allow_nan=False).encode()


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, rules: AccessRules, limits: Limits) -> None:
        self._app, self._rules, self._limits = app, rules, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        scope = _with_origin_form(scope)
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, _protected(send))

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._rules.check_host(headers.get("host"))
            if scope["method"] not in _SAFE:
                self._rules.check_origin(headers.get("origin"), headers.get("host"))
            scope["state"]["shows_token"] = self._shows_token(scope, headers)
        except Refused as exc:
            body = {"error": exc.kind, "message": str(exc)}
            challenge = {"www-authenticate": "Bearer"} if exc.status == 401 else None
            await Json(body, exc.status, challenge)(scope, receive, send)
            return
        is_picture = scope["path"] == "/v1/segment"
        most = self._limits.picture_bytes if is_picture else self._limits.json_bytes
        limited = _limited(receive, headers, most, self._limits.request_seconds)
        await self._app(scope, limited, send)

    def _shows_token(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request shows the token, or none is asked for."""
        query = scope["query_string"] if scope["path"] in _TOKEN_IN_QUERY else b""
        try:
            self._rules.check_token(headers.get("authorization"), query=query)
        except Refused:
            if scope["path"] in _OPEN_PATHS:
                return False
            raise
        return True

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, protocols = Headers(scope=scope), scope["subprotocols"]
        try:
            self._rules.check_host(headers.get("host"))
            self._rules.check_origin(headers.get("origin"), headers.get("host"))
            self._rules.check_token(headers.get("authorization"), protocols=protocols)
        except Refused as exc:
            # Browsers tell a page the code only of a connection that was accepted first.
            await receive()
            protocol = PROTOCOL if PROTOCOL in protocols else None
            await send({"type": "websocket.accept", "subprotocol": protocol})
            await send({"type": "websocket.close", "code": exc.close_code, "reason": exc.kind})
            return
        await self._app(scope, receive, send)


def _with_origin_form(scope: Scope) -> Scope:
    """Take a target such as ``http://host/path`` apart; its host counts, not that of the header."""
    found = _ABSOLUTE.fullmatch(scope["raw_path"])
    if found is None:
        return scope
    raw_path = found[2] or b"/"
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    path = unquote(raw_path.decode("ascii"))
    return {
        **scope, "raw_path": raw_path, "path": path, "headers": [*headers, (b"host", found[1])],
    }  # fmt: skip


def _protected(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def send_protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _PROTECTION.items():
                headers.setdefault(name, value)
        await send(message)

    return send_protected


def _limited(receive: Receive, headers: Headers, most: int, seconds: float) -> Receive:
    """Receive a body of limited length in limited time."""
    too_large = HTTPException(413, f"body: expected at most {most} bytes, got more")
    last, so_far, is_whole = time.monotonic() + seconds, 0, False
    length = headers.get("content-length", "")
    announced = int(length) if length.isdecimal() and len(length) < 19 else 0

    async def receive_limited() -> Message:
        nonlocal so_far, is_whole
        if is_whole:  # what follows is that the client goes
            return await receive()
        if announced > most:
            raise too_large
        try:
            message = await asyncio.wait_for(receive(), max(last - time.monotonic(), 0.0))
        except asyncio.TimeoutError:
            text = f"body: expected all of it within {seconds:g} s, got {so_far} bytes"
            raise HTTPException(408, text) from None
        is_whole = not message.get("more_body", False)
        so_far += len(message.get("body", b""))
        if so_far > most:
            raise too_large
        return message

    return receive_limited
