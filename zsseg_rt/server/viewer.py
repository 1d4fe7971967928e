"""One viewer's WebSocket: a frame is sent once the one before it was acknowledged.

So nothing queues up on a slow link, in whatever buffers lie on the way: what a viewer sees is as
old as one message takes, however slow that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from zsseg_rt.server.hub import Hub
from zsseg_rt.server.preview import Result

GOING_AWAY, POLICY, TOO_MANY = 1001, 1008, 4429
_BETWEEN = 0.005  # seconds between a viewer's messages, however fast they come
_LOOK = 0.5  # seconds; how much later than it should a viewer is dropped at most
_GOODBYE = 0.5  # seconds that a client gets to take a closing message


async def watch(socket: WebSocket, hub: Hub) -> None:
    """Serve a viewer until it or the server goes."""
    if hub.watchers["viewers"] >= hub.limits.viewers:
        await socket.close(TOO_MANY, "too many viewers")
        return
    hub.watchers["viewers"] += 1
    try:
        await _Viewer(socket, hub).run()
    finally:
        hub.watchers["viewers"] -= 1


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
            self._answers["pong"] = {"type": "pong", "t": _number(message, "t")}
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
        told, new = self._vocabulary, self._hub.vocabulary
        if told and told["version"] == new["version"]:
            return bool(told["unknown_below"] != new["unknown_below"])
        return not told or time.monotonic() - self._sent_at > _LOOK

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


def _number(message: Mapping[str, Any], key: str) -> float:
    value = message.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key}: expected a number")
    return value


def _now_ms() -> float:
    return round(time.monotonic() * 1000.0, 3)
