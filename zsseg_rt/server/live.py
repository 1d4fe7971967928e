"""The server as a whole: a stream that is labelled, and its clients."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn

from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.server.api import create_app
from zsseg_rt.server.hub import Hub
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.settings import ServerSettings
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Source

__all__ = ["LiveServer"]


class LiveServer:
    """Labels sources and shows them to browsers and programs."""

    def __init__(
        self,
        engine: Engine,
        sources: Sequence[Source],
        settings: ServerSettings,
        **stream_settings: Any,
    ) -> None:
        self._settings = settings
        labeller = Labeller(engine, settings.limits)
        self._stream = Stream(sources, labeller.segment_frame, **stream_settings)
        self._hub = Hub(self._stream, labeller, settings.limits)
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._listener = _listen(settings.host, settings.port)
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        config = uvicorn.Config(
            create_app(self._hub, page),
            http="h11",
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            ws_max_size=settings.limits.message_bytes,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=1,
        )
        self._uvicorn = uvicorn.Server(config)
        self._threads = [
            threading.Thread(target=self._label, name="label", daemon=True),
            threading.Thread(target=self._answer, name="answer", daemon=True),
        ]

    @property
    def url(self) -> str:
        """Where to open the page."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{host}:{port}/"

    def start(self) -> None:
        """Label and answer, in threads of their own."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let :meth:`wait` return; safe in any thread and in a signal handler."""
        self._over.set()

    def wait(self) -> None:
        """Wait until the server is stopped."""
        while not self._over.wait(0.3):
            pass

    def close(self) -> None:
        """End the stream and let all clients go."""
        self._stream.stop()
        self._hub.close_soon()
        self._uvicorn.should_exit = True
        for thread in self._threads:
            thread.join(3.0)

    def __enter__(self) -> LiveServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _label(self) -> None:
        for seg in self._stream:
            self._hub.publish(seg)

    def _answer(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        news = asyncio.create_task(self._hub.run())
        await self._uvicorn.serve([self._listener])
        news.cancel()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as exc:
        raise ArgumentError(f"--port {port}: cannot listen on {host}: {exc.strerror}") from exc
