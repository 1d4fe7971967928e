"""Who may come in: names that the server goes by, pages that may ask, and the token."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zsseg_rt.common.schema import json_text
from zsseg_rt.server.settings import ServerSettings

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_NETLOC = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(rf"(https?)://({_NETLOC.pattern})")
_STANDARD_PORTS = {"http": "80", "https": "443"}


_REFUSALS = {
    "HostError": (
        400, 4403, "Host: expected a name that this server goes by. Add yours with --allow-host.",
    ),
    "OriginError": (
        403, 4403, "Origin: expected this server's own page. Add a proxy's name with --allow-host.",
    ),
    "TokenError": (
        401, 4401, "token: expected the one that the server was started with, as "
        "'Authorization: Bearer TOKEN'.",
    ),
    "BusyError": (503, 4429, "connections: expected fewer at a time. Try again after a second."),
}  # fmt: skip
_HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}


class Refused(Exception):  # noqa: N818 - what happened to a request, not an error of ours
    """A request that is not let in; ``kind`` is what the error's body calls it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.status, self.close_code, message = _REFUSALS[kind]
        super().__init__(message)


PROTOCOL = "zsseg.v1"  # subprotocol of the WebSocket

_OPEN_PATHS = ("/", "/healthz")
_TOKEN_IN_QUERY = ("/stream.mjpg",)  # for players, which cannot send headers
_SAFE = ("GET", "HEAD")
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
        return json_text(content, separators=(",", ":"), allow_nan=False).encode()


class Gate:
    """ASGI middleware around the whole application: the checks of every request."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._limits = app, settings.limits
        self._token = None if settings.token is None else settings.token.encode()
        # Hosts whose pages may ask even if a proxy changed the request's Host
        self._origins = {name.lower().strip("[]") for name in settings.allowed_hosts}
        self._hosts = {*_LOCAL_NAMES, *self._origins, settings.host.lower()}
        # Whether every numeric address will do as a name. A page of somebody else's, whose name was
        # pointed at this machine (DNS rebinding), has a name and not a number
        self._any_address = settings.host in ("0.0.0.0", "::")
        if self._any_address:
            own = socket.gethostname().lower()
            self._hosts |= {own, f"{own}.local"}

    def check_host(self, host: str | None) -> None:
        """Refuse a request that calls the server by a name that is not its own."""
        match = _NETLOC.fullmatch((host or "").lower())
        name = match[1].strip("[]") if match else ""
        if name in self._hosts:
            return
        if self._any_address:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return
        raise Refused("HostError")

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse a request that another site's page makes."""
        if origin is None:
            return
        match = _ORIGIN.fullmatch(origin.lower())
        if match is not None:
            scheme, netloc, name = match[1], match[2], match[3]
            standard = ":" + _STANDARD_PORTS[scheme]
            same = netloc.removesuffix(standard) == (host or "").lower().removesuffix(standard)
            if same or name.strip("[]") in self._origins:
                return
        raise Refused("OriginError")

    def check_token(
        self, authorization: str | None, *, protocols: Sequence[str] = (), query: bytes = b""
    ) -> None:
        if self._token is None:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        tokens = [shown.strip()] if scheme.lower() == "bearer" else []
        tokens += [one.removeprefix("token.") for one in protocols if one.startswith("token.")]
        tokens += parse_qs(query.decode("latin-1")).get("token", [])
        if not any([hmac.compare_digest(one.encode(), self._token) for one in tokens[:4]]):  # noqa: C419
            raise Refused("TokenError")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, is_picture = Headers(scope=scope), scope["path"] == "/v1/segment"
        most = self._limits.picture_bytes if is_picture else self._limits.json_bytes
        body = _Body(receive, headers, most, self._limits.request_seconds)
        is_extra = scope["state"].get("is_extra", False)
        send = _protected(send, body, is_extra)
        try:
            if is_extra and scope["path"] != "/healthz":
                raise Refused("BusyError")
            self.check_host(headers.get("host"))
            if scope["method"] not in _SAFE:
                self.check_origin(headers.get("origin"), headers.get("host"))
            scope["state"]["shows_token"] = self._shows_token(scope, headers)
        except Refused as exc:
            content = {"error": exc.kind, "message": str(exc)}
            await Json(content, exc.status, _HEADERS.get(exc.status))(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _shows_token(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request shows the token, or none is asked for."""
        query = scope["query_string"] if scope["path"] in _TOKEN_IN_QUERY else b""
        try:
            self.check_token(headers.get("authorization"), query=query)
        except Refused:
            if scope["path"] in _OPEN_PATHS:
                return False
            raise
        return True

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, protocols = Headers(scope=scope), scope["subprotocols"]
        try:
            if scope["state"].get("is_extra", False):
                raise Refused("BusyError")
            self.check_host(headers.get("host"))
            self.check_origin(headers.get("origin"), headers.get("host"))
            self.check_token(headers.get("authorization"), protocols=protocols)
        except Refused as exc:
            # Browsers tell a page the code only of a connection that was accepted first.
            await receive()
            protocol = PROTOCOL if PROTOCOL in protocols else None
            await send({"type": "websocket.accept", "subprotocol": protocol})
            await send({"type": "websocket.close", "code": exc.close_code, "reason": exc.kind})
            return
        await self._app(scope, receive, send)


def _protected(send: Send, body: _Body, is_last: bool) -> Callable[[Message], Awaitable[None]]:
    async def send_protected(message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await body.drain()
            headers = MutableHeaders(scope=message)
            for name, value in _PROTECTION.items():
                headers.setdefault(name, value)
            if is_last:
                headers["connection"] = "close"
        await send(message)

    return send_protected


class _Body:
    """A request's body, of limited length in limited time."""

    def __init__(self, receive: Receive, headers: Headers, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._last, self._so_far, self._is_whole = time.monotonic() + seconds, 0, False
        self._announced = int(headers.get("content-length", "0"))  # of digits: h11 refuses others
        self._asks_first = "expect" in headers

    async def receive(self) -> Message:
        if self._is_whole:  # what follows is that the client goes
            return await self._receive()
        try:
            message = None if self._announced > self._most else await self._next()
        except asyncio.TimeoutError:
            text = f"body: expected all of it within {self._seconds:g} s, got {self._so_far} bytes"
            raise HTTPException(408, text) from None
        if message is None or self._so_far > self._most:
            raise HTTPException(413, f"body: expected at most {self._most} bytes, got more")
        return message

    async def drain(self) -> None:
        """Throw away what the client still sends: closed on, it would see a reset, no answer."""
        with contextlib.suppress(asyncio.TimeoutError):
            while not (self._is_whole or (self._asks_first and not self._so_far)):
                await self._next()

    async def _next(self) -> Message:
        left = max(self._last - time.monotonic(), 0.0)
        message = await asyncio.wait_for(self._receive(), left)
        self._is_whole = not message.get("more_body", False)
        self._so_far += len(message.get("body", b""))
        return message
