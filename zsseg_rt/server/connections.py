"""Connections that take room and do nothing are dropped; uvicorn would wait for them for ever."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from zsseg_rt.server.settings import ServerSettings
from zsseg_rt.stream.gstreamer.rtsp_sink import network_of

_LOOK_EVERY = 0.5  # seconds
_RESERVE = 8  # connections beyond the limits that may ask for the health
_HEALTH = (b"GET /healthz", b"HEAD /healthz")
_GOODBYE = 1.0  # seconds that a refused connection gets to take its last bytes
_BUSY = b'{"error":"BusyError","message":"connections: expected fewer at a time. Try again."}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BUSY), _BUSY)
)


@dataclass(kw_only=True)
class _Watch:
    transport: asyncio.Transport
    address: str
    state: Literal["admitted", "waiting", "health", "refused"]
    until: float = 0.0  # for all states but the first
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

    def take(self, protocol: H11Protocol, transport: asyncio.Transport) -> None:
        """Take in a connection; beyond the limits it may only ask for the health."""
        limits, now, address = self._limits, time.monotonic(), self._who(transport)
        admitted = self._of_state("admitted")
        mine = sum(one.address == address for one in admitted) if address else 0
        is_full = len(admitted) >= limits.connections or mine >= limits.connections_per_address
        self._watched[protocol] = _Watch(
            transport=transport,
            address=address,
            state="waiting" if is_full else "admitted",
            until=now + _GOODBYE,
            idle_since=now,
        )
        # Whoever asks for the health does so at once; whoever is silent makes room for him.
        if len(waiting := self._of_state("waiting", "health")) > _RESERVE:
            self._refuse(waiting[0])
        if len(refused := self._of_state("refused")) > limits.connections:
            refused[0].transport.abort()

    def lets(self, protocol: H11Protocol, data: bytes) -> bool:
        """Whether what a connection sends is heard."""
        watch = self._watched.get(protocol)
        if watch is None or watch.state == "refused":
            return False
        if watch.state == "waiting":
            if not data.startswith(_HEALTH):
                self._refuse(watch)
                return False
            watch.state = "health"
        return True

    def is_of_the_reserve(self, protocol: H11Protocol) -> bool:
        """Whether a connection gets one answer and no more."""
        return protocol in self._watched and self._watched[protocol].state == "health"

    def _of_state(self, *states: str) -> list[_Watch]:
        return [watch for watch in self._watched.values() if watch.state in states]

    def _refuse(self, watch: _Watch) -> None:
        """Say why in a few words; the client, which may still be sending, is left to close."""
        was_heard, watch.state = watch.state == "health", "refused"
        watch.until = time.monotonic() + _GOODBYE
        self._counts["connections_refused"] += 1
        if was_heard:
            watch.transport.abort()
            return
        watch.transport.write(_REFUSAL)
        with contextlib.suppress(OSError):  # it has gone already
            watch.transport.write_eof()

    def _who(self, transport: asyncio.Transport) -> str:
        """Whose connection it is; empty if it is not counted by address."""
        peer = transport.get_extra_info("peername")
        if not isinstance(peer, tuple):  # it has gone already
            return ""
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        is_proxy = any(address in network for network in self._proxies)
        return "" if is_proxy else network_of(str(address))

    def forget(self, protocol: H11Protocol) -> None:
        """Make room for another: it is closed. :meth:`look` finds those that became WebSockets."""
        self._watched.pop(protocol, None)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Drop what has been silent or stuck for too long."""
        for protocol, watch in list(self._watched.items()):
            transport = watch.transport
            if transport.is_closing() and not transport.get_write_buffer_size():
                del self._watched[protocol]
            elif watch.state in ("waiting", "health") and now > watch.until:
                self._refuse(watch)
            elif watch.state == "refused":
                if now > watch.until:
                    transport.abort()
            elif self._is_stuck(watch, now):
                transport.abort()
            elif self._is_idle(protocol, watch, now):
                self._counts["connections_dropped"] += 1
                transport.abort()

    def abort_all(self) -> None:
        for watch in self._watched.values():
            watch.transport.abort()

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
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            guard.take(self, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            guard.forget(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if guard.lets(self, data):
                super().data_received(data)
                if self.cycle is not None and guard.is_of_the_reserve(self):
                    self.cycle.keep_alive = False

    return GuardedProtocol
