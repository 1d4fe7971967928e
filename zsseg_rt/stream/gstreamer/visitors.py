"""Who is connected to an RTSP server: how many, for how long, and how much they send.

GStreamer's server takes any number of connections, keeps them without a word for ever, and keeps
all lines of a request's head, before anybody has shown a password.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zsseg_rt.stream.gstreamer.address import network_of

_MOST = 64  # connections
_MOST_PER_ADDRESS = 32
_UNTIL_SETUP = 10.0  # seconds
# What viewers send: a few requests, and some hundred bytes of reports every few seconds.
_BURST, _RATE = 1 << 16, 1 << 11  # bytes, bytes per second
_UNREAD = 1 << 14  # bytes that the kernel keeps for a connection; it doubles them
_RECEIVED_AT = 128  # where tcp_info, of Linux 4.1 and later, counts received bytes


@dataclass(eq=False)
class _Visitor:
    socket: Callable[[], Any]  # a Gio.Socket, which closes when nobody holds it, or None
    address: str
    came_at: float
    has_session: bool = False
    is_handed_over: bool = False  # to the other half of a tunnel through HTTP

    def send_away(self) -> None:
        """Break the connection off; the server sees it and frees everything in its own thread.

        An end (shutdown) would not do: it comes after all that a client goes on to send.
        """
        if (mine := self.socket()) is not None:
            ctypes.CDLL(None).connect(mine.get_fd(), bytes(16), 16)  # to AF_UNSPEC: to nobody


class Visitors:
    """The connections of one server; for the thread in which it hears of them."""

    def __init__(self) -> None:
        self._here: list[_Visitor] = []

    def take(self, client: Any) -> None:
        """Somebody connected; he is sent away if there are too many."""
        self._here = [one for one in self._here if one.socket() is not None]
        connection = client.get_connection()
        address, gio_socket = network_of(connection.get_ip() or ""), connection.get_read_socket()
        gio_socket.set_option(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNREAD)
        visitor = _Visitor(gio_socket.weak_ref(), address, time.monotonic())
        mine = sum(one.address == address for one in self._here)
        if len(self._here) >= _MOST or mine >= _MOST_PER_ADDRESS:
            visitor.send_away()
            return
        client.connect("new-session", _note, visitor, "has_session")
        client.connect("closed", _note, visitor, "is_handed_over")
        self._here.append(visitor)

    def look(self) -> None:
        """Send away who is silent without a session, or sends more than viewers do."""
        now = time.monotonic()
        self._here = [one for one in self._here if one.socket() is not None]
        sessions = Counter(one.address for one in self._here if one.has_session)
        for visitor in self._here:
            age = now - visitor.came_at
            is_half = visitor.is_handed_over and sessions[visitor.address] > 0
            is_viewer = visitor.has_session or is_half
            is_silent = not is_viewer and age > _UNTIL_SETUP
            if is_silent or _received(visitor.socket()) > _BURST + _RATE * age:
                visitor.send_away()


def _note(*arguments: Any) -> None:
    """Called in threads of the server; sets a flag that :meth:`Visitors.look` reads."""
    visitor, fact = arguments[-2:]
    setattr(visitor, fact, True)


def _received(gio_socket: Any) -> int:
    """Bytes that have come in over a connection; 0 where the system does not count them."""
    if gio_socket is None or not hasattr(socket, "TCP_INFO"):
        return 0
    try:
        with socket.socket(fileno=os.dup(gio_socket.get_fd())) as same:
            facts = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
    except OSError:  # it is closed
        return 0
    is_counted = len(facts) == _RECEIVED_AT + 8
    return int(struct.unpack_from("=Q", facts, _RECEIVED_AT)[0]) if is_counted else 0
