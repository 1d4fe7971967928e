"""The server as a whole: a stream that is labelled, and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from zsseg_rt.engine import Engine
from zsseg_rt.errors import EngineStateError, SourceError, ZssegError
from zsseg_rt.runtime.frame_memory import check_family
from zsseg_rt.server.access import Gate
from zsseg_rt.server.api import create_app
from zsseg_rt.server.hub import Hub
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.settings import ServerSettings, listen
from zsseg_rt.stream.follow import Follow
from zsseg_rt.stream.gstreamer.rtsp_sink import network_of
from zsseg_rt.stream.runner import Policy, StreamParts
from zsseg_rt.stream.watch import Patience
from zsseg_rt.stream.writers import frame_of

_GOODBYE = 0.1  # seconds that clients get to hear that the server stops
_LOOK = 0.1
_CLOSE_EVERY = 0.05
_PATIENCE = 3.0  # seconds for a thread to end
_log = logging.getLogger(__name__)


class LiveServer:
    """Labels sources and shows the newest frames to browsers and programs.

    Use it as a context manager: it starts with the block and stops with it. A source that is lost
    does not end it; one that never gave a frame does, if no other works.

    Args:
        engine: An engine with classes; the server's alone while it runs.
        source: As for :meth:`Engine.stream`.
        settings: Where to listen, and who may come in.
        policy: As for :meth:`Engine.stream`, like ``steady``, ``skip_still`` and ``follow``;
            ``"latest"`` shows videos at their own speed.
        follow: None follows cameras with policy ``"latest"``.
        wait: Whether cameras that are off at the start are waited for.
        listener: A socket that listens already, made by :func:`zsseg_rt.server.settings.listen`;
            the server closes it. None makes one.

    Raises:
        ArgumentError: A source or setting is not one that exists or does not fit the family, or
            the port is taken.
        SourceError: A list of sources cannot be read.
        EngineStateError: The engine has no classes yet.

    Example:
        >>> with LiveServer(engine, "rtsp://camera/1") as server:  # doctest: +SKIP
        ...     print(server.address)
        ...     server.wait()
    """

    def __init__(  # noqa: PLR0913 - as Engine.stream
        self,
        engine: Engine,
        source: str | Path | Sequence[str | Path],
        settings: ServerSettings | None = None,
        *,
        policy: Policy | None = "latest",
        steady: bool = False,
        skip_still: bool = False,
        follow: Follow | None = None,
        wait: bool = False,
        listener: socket.socket | None = None,
    ) -> None:
        self.settings = settings or ServerSettings()
        labeller = Labeller(engine, self.settings.limits)
        if steady or skip_still:
            check_family(engine.bundle.family)
        parts = StreamParts.open(
            source,
            labeller.channel_order,
            policy=policy,
            patience=Patience(at_start=wait),
            steady=steady,
            skip_still=skip_still,
            follow=follow,
            loop=self.settings.loop,
        )
        self._stream = parts.start(
            labeller.segment_frame, None, engine.device, lambda: labeller.vocabulary.version
        )
        self._hub = Hub(self._stream, labeller, self.settings.limits)
        self._guard = ConnectionGuard(self.settings, self._hub.counts)
        app = create_app(self._hub, stale_seconds=self.settings.stale_seconds)
        self._uvicorn = uvicorn.Server(_configure(app, self.settings, self._guard))
        self._listener = listener or listen(self.settings.host, self.settings.port)
        self._host, self._port = self._listener.getsockname()[:2]
        self._is_over = False  # no Event: a signal may come while its thread holds the lock of one
        self._closing = threading.Event()
        self._error: ZssegError | None = None
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (
                ("label", self._label),
                ("label anew", self._label_anew),
                ("answer", self._answer),
            )
        ]

    @property
    def address(self) -> str:
        """Where to open the page, token included."""
        token = f"#token={self.settings.token}" if self.settings.token else ""
        return f"http://{self.host}:{self._port}/{token}"

    @property
    def host(self) -> str:
        """The name or address in :attr:`address`."""
        host = socket.gethostname() if self._host in ("0.0.0.0", "::") else str(self._host)
        return f"[{host}]" if ":" in host else host

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return int(self._port)

    def start(self) -> None:
        """Label and answer, in threads of their own."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let :meth:`wait` return; safe in any thread and in a signal handler."""
        self._is_over = True

    def wait(self) -> None:
        """Wait until the server is stopped.

        Raises:
            SourceError: No source has ever given a frame, and each has failed.
            ZssegError: Labelling or answering failed.
        """
        while not self._is_over:
            time.sleep(_LOOK)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the stream and let all clients go. Calling it twice is harmless."""
        self._closing.set()
        self._stream.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_PATIENCE)
        self._stream.close()
        self._hub.labeller.close()
        self._listener.close()

    def __enter__(self) -> LiveServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _label(self) -> None:
        with self._ends_the_server_if_it_fails("labelling"):
            threshold = self._hub.labeller.unknown_below
            for seg in self._stream:
                self._hub.publish(seg, threshold)
                threshold = self._hub.labeller.unknown_below  # before the next frame is labelled
        if self._error is None and not self._closing.is_set():
            _log.warning("all sources have ended; the server keeps running")

    def _label_anew(self) -> None:
        """Give the last image of a source that has ended the classes of now."""
        labeller = self._hub.labeller
        with self._ends_the_server_if_it_fails("labelling"):
            while not self._closing.wait(_LOOK):
                for name, stats in self._stream.stats().items():
                    is_given_out = stats.captured == stats.given_out + stats.dropped
                    result = self._hub.newest(name, {})
                    if stats.state != "ended" or not is_given_out or result is None:
                        continue
                    with contextlib.suppress(EngineStateError):  # it was closed meanwhile
                        threshold = labeller.unknown_below
                        shown = result.seg.vocabulary_version, result.unknown_below
                        if shown != (labeller.vocabulary.version, threshold):
                            frame = frame_of(result.seg)
                            seg = labeller.segment_beside(frame.image)
                            self._hub.publish(replace(seg, frame=frame), threshold)

    def _answer(self) -> None:
        with self._ends_the_server_if_it_fails("answering"):
            asyncio.run(self._answer_until_closed())

    async def _answer_until_closed(self) -> None:
        tasks = [asyncio.create_task(work) for work in (self._hub.run(), self._guard.run())]
        answering = asyncio.create_task(self._uvicorn.serve([self._listener]))
        while not (self._closing.is_set() or any(task.done() for task in (answering, *tasks))):
            await asyncio.sleep(_CLOSE_EVERY)
        self._hub.close()
        await asyncio.sleep(_GOODBYE)
        self._uvicorn.should_exit = True
        while not answering.done():
            self._guard.abort_all()
            await asyncio.sleep(_CLOSE_EVERY)
        for task in tasks:
            if task.done():
                task.result()  # raises what ended it
            task.cancel()
        await answering

    @contextlib.contextmanager
    def _ends_the_server_if_it_fails(self, what: str) -> Iterator[None]:
        # An error that is not ours is a defect, and its traceback is printed by the thread.
        error: ZssegError | None = SourceError(f"server: {what} failed, see the traceback above")
        try:
            yield
            error = None
        except ZssegError as exc:
            error = exc
        finally:
            if error is not None:
                self._error = error
                self._is_over = True


def _configure(app: FastAPI, settings: ServerSettings, guard: ConnectionGuard) -> uvicorn.Config:
    """How uvicorn runs; it logs errors alone, for its other lines hold queries and thus tokens."""
    return uvicorn.Config(
        Gate(app, settings),
        http=guarded_protocol(guard),
        ws=WebSocketsSansIOProtocol,
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws_max_size=settings.limits.message_bytes,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,
    )


_LOOK_EVERY = 0.5  # seconds
_RESERVE = 8  # connections beyond the limits at a time
_LAST = 1.0  # seconds that one of these, or one that closes, gets for each step


@dataclass(kw_only=True)
class _Watch:
    address: str
    is_extra: bool  # beyond the limits: it gets one answer, the health or that the server is busy
    cycle: RequestResponseCycle | None = None
    idle_since: float
    pending: int = 0
    pending_since: float = 0.0


class ConnectionGuard:
    """Knows all connections; used in the loop's thread."""

    def __init__(self, settings: ServerSettings, counts: Counter[str]) -> None:
        self._limits, self._counts = settings.limits, counts
        self._proxies = [ipaddress.ip_network(network) for network in settings.proxies]
        self._watched: dict[H11Protocol, _Watch] = {}

    def take(self, protocol: H11Protocol) -> bool:
        """Take in a connection; returns whether it is beyond the limits."""
        self._forget_closed()
        limits, address = self._limits, self._who(protocol.transport)
        admitted = [watch.address for watch in self._watched.values() if not watch.is_extra]
        mine = admitted.count(address) if address else 0
        is_extra = len(admitted) >= limits.connections or mine >= limits.connections_per_address
        self._watched[protocol] = _Watch(
            address=address, is_extra=is_extra, idle_since=time.monotonic()
        )
        # Whoever asks for the health does so at once; whoever is silent makes room for him.
        extra = [one for one, watch in self._watched.items() if watch.is_extra]
        if len(extra) > _RESERVE:
            extra[0].transport.abort()
        self._counts["connections_refused"] += is_extra
        return is_extra

    def _who(self, transport: asyncio.Transport) -> str:
        """Whose connection it is; empty if it is not counted by address."""
        peer = transport.get_extra_info("peername")
        if not isinstance(peer, tuple):  # it has gone already
            return ""
        host = peer[0].partition("%")[0].removeprefix("::ffff:")
        is_proxy = any(ipaddress.ip_address(host) in network for network in self._proxies)
        return "" if is_proxy else network_of(host)

    def _forget_closed(self) -> None:
        self._watched = {
            protocol: watch
            for protocol, watch in self._watched.items()
            if not protocol.transport.is_closing() or protocol.transport.get_write_buffer_size()
        }

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Drop what has been silent or stuck for too long."""
        self._forget_closed()
        for protocol, watch in self._watched.items():
            if self._is_stuck(protocol, watch, now) or self._is_idle(protocol, watch, now):
                self._counts["connections_dropped"] += not watch.is_extra
                protocol.transport.abort()

    def abort_all(self) -> None:
        for protocol in self._watched:
            protocol.transport.abort()

    def _is_stuck(self, protocol: H11Protocol, watch: _Watch, now: float) -> bool:
        """Whether the client has taken no byte for too long, though bytes wait for it."""
        pending = protocol.transport.get_write_buffer_size()
        if pending != watch.pending or not pending:
            watch.pending, watch.pending_since = pending, now
        most = _LAST if protocol.transport.is_closing() else self._limits.stuck_seconds
        return now - watch.pending_since > most

    def _is_idle(self, protocol: H11Protocol, watch: _Watch, now: float) -> bool:
        """Whether it has waited for too long for a request to come in whole."""
        if protocol.transport.get_protocol() is not protocol:  # a WebSocket by now
            return False
        cycle: RequestResponseCycle | None = protocol.cycle
        is_busy = cycle is not None and not cycle.response_complete
        if is_busy or cycle is not watch.cycle:
            watch.cycle, watch.idle_since = cycle, now
        most = _LAST if watch.is_extra else self._limits.request_seconds
        return now - watch.idle_since > most


def guarded_protocol(guard: ConnectionGuard) -> type[H11Protocol]:
    """The protocol of a server whose connections a guard looks after."""

    class GuardedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {"is_extra": guard.take(self)}

    return GuardedProtocol
