"""The overlay as Motion JPEG, for programs that know no WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from zsseg_rt.server.hub import Hub
from zsseg_rt.server.pictures import VERSION_HEADER
from zsseg_rt.server.worker import Busy

_BOUNDARY = "frame"


class MotionJpeg(StreamingResponse):
    """Sends the newest frame whenever the client has taken the one before.

    What lies in buffers on the way is not ours to throw away, so on a slow link this falls behind;
    the WebSocket does not.
    """

    def __init__(self, hub: Hub, source: str | None) -> None:
        kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        super().__init__(_parts(hub, source), media_type=kind)
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless as many clients have it as may: checked and counted in one step."""
        watchers = self._hub.watchers
        if watchers["motion_jpegs"] >= self._hub.limits.motion_jpegs:
            raise Busy("stream.mjpg: expected fewer clients at a time. Close another.")
        watchers["motion_jpegs"] += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            watchers["motion_jpegs"] -= 1


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
