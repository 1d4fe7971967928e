"""Connections that take room and do nothing are dropped, whatever they were opened for.

uvicorn waits for ever for a request that does not come and for a client that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from zsseg_rt.server.settings import Limits

__all__ = ["ConnectionGuard", "guarded_protocol"]

_LOOK_EVERY = 0.5  # seconds
_GOODBYE = 1.0  # seconds that a refused or closing connection gets to take its last bytes
_BUSY = b'{"error":"BusyError","message":"connections: expected fewer at a time. Try again."}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BUSY), _BUSY)
)


@dataclass(kw_only=True)
class _Watch:
    transport: asyncio.Transport
    opened_at: float
    is_refused: bool
    cycle: RequestResponseCycle | None = None
    idle_since: float
    pending: int = 0
    pending_since: float = 0.0


class ConnectionGuard:
    """Knows all connections; used in the loop's thread.

    Args:
        limits: The most that clients may use.
        counts: Where refused and dropped connections are counted.
    """

    def __init__(self, limits: Limits, counts: Counter[str]) -> None:
        self._limits, self._counts = limits, counts
        self._watched: dict[H11Protocol, _Watch] = {}

    def admit(self, protocol: H11Protocol, transport: asyncio.Transport) -> bool:
        """Take in a connection, unless there are too many; then call :meth:`refuse`."""
        open_now = len(self._watched)
        refused = open_now >= self._limits.connections
        if open_now >= 2 * self._limits.connections:  # no room even for refusals
            transport.abort()
        else:
            now = time.monotonic()
            self._watched[protocol] = _Watch(
                transport=transport, opened_at=now, is_refused=refused, idle_since=now
            )
        return not refused

    def refuse(self, transport: asyncio.Transport) -> None:
        """Say why in a few words; the client, which may still be sending, is left to close."""
        self._counts["connections_refused"] += 1
        transport.write(_REFUSAL)
        with contextlib.suppress(OSError):  # it has gone already
            transport.write_eof()

    def forget(self, protocol: H11Protocol) -> None:
        """Make room for another: it is closed. :meth:`look` finds those that became WebSockets."""
        self._watched.pop(protocol, None)

    async def run(self) -> None:
        """Look after connections until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Drop what has been silent or stuck for too long."""
        for protocol, watch in list(self._watched.items()):
            transport = watch.transport
            if transport.is_closing() and not transport.get_write_buffer_size():
                del self._watched[protocol]
            elif self._is_refused_for_long(watch, now) or self._is_stuck(watch, now):
                transport.abort()
            elif self._is_idle(protocol, watch, now):
                self._counts["connections_dropped"] += 1
                transport.abort()

    def abort_all(self) -> None:
        """Cut every connection."""
        for watch in self._watched.values():
            watch.transport.abort()

    def _is_refused_for_long(self, watch: _Watch, now: float) -> bool:
        return watch.is_refused and now - watch.opened_at > _GOODBYE

    def _is_stuck(self, watch: _Watch, now: float) -> bool:
        """Whether the client has taken no byte for too long, though bytes wait for it."""
        pending = watch.transport.get_write_buffer_size()
        if pending != watch.pending or not pending:
            watch.pending, watch.pending_since = pending, now
            return False
        most = _GOODBYE if watch.transport.is_closing() else self._limits.stuck_seconds
        if now - watch.pending_since <= most:
            return False
        self._counts["connections_dropped"] += 1
        return True

    def _is_idle(self, protocol: H11Protocol, watch: _Watch, now: float) -> bool:
        """Whether it has waited for too long for a request to come in whole."""
        if watch.transport.get_protocol() is not protocol:  # a WebSocket by now
            return False
        cycle: RequestResponseCycle | None = protocol.cycle
        is_busy = cycle is not None and not cycle.response_complete
        if is_busy or cycle is not watch.cycle:
            watch.cycle, watch.idle_since = cycle, now
            return False
        return now - watch.idle_since > self._limits.request_seconds


def guarded_protocol(guard: ConnectionGuard) -> type[H11Protocol]:
    """The protocol of a server whose connections a guard looks after."""

    class GuardedProtocol(H11Protocol):
        _is_admitted = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._is_admitted = guard.admit(self, transport)
            if not self._is_admitted:
                self.connections.discard(self)
                guard.refuse(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            guard.forget(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._is_admitted:
                super().data_received(data)

    return GuardedProtocol
