"""An RTSP server in this process: its viewers share one encoder, and without any nothing runs."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import SourceError
from zsseg_rt.stream.gstreamer.address import Address, network_of
from zsseg_rt.stream.gstreamer.encoders import (
    NVIDIA,
    Encoding,
    encoding_for,
    leave,
    working_encoding,
)
from zsseg_rt.stream.gstreamer.frames import buffer_of
from zsseg_rt.stream.gstreamer.library import Server, load, load_server

_MOST_VIEWERS = 32
_LONGEST_BODY = 1 << 16  # bytes, of a request; GStreamer reads it before it asks for the password
_BACKLOG = 64  # connections that wait to be taken; of five, a few silent ones keep all others out
_LOOKS_PER_SECOND = 4
_CLEAN_EVERY = 2  # seconds; viewers over UDP that vanished are forgotten after a minute
_ENDS_WITHIN = 1.5  # seconds; less than a stop waits
_KEY_EVERY = 1_000_000_000  # nanoseconds; how long a new viewer waits for a picture
_ROLE = "viewer"
_RIGHTS = ("media.factory.access", "media.factory.construct")


class Channel:
    """What viewers of one path see. Frames are sent by one thread, viewers come in others."""

    def __init__(self, gst: Any, channel_order: str) -> None:
        self._gst, self._format = gst, channel_order.upper()
        self.replace: Callable[[str], None] | None = None
        """Takes another encoder, as the one at work failed for a reason; None if it need not."""
        self._lock = threading.Lock()
        self._source: Any = None  # the appsrc, while somebody watches
        self._caps = ""
        self._encoder: Any = None
        self._last_key = 0

    def welcome(self) -> None:
        """Let the next frame be one that a new viewer can begin with."""
        self._last_key = 0

    @property
    def is_watched(self) -> bool:
        """Whether frames are encoded and sent."""
        return self._source is not None

    def configure(self, _factory: Any, media: Any) -> None:
        """The first viewer came; called in a thread of the server."""
        pipeline = media.get_element()
        media.set_clock(self._gst.SystemClock.obtain())
        with self._lock:
            source = self._source = pipeline.get_by_name_recurse_up("frames")
            self._encoder = pipeline.get_by_name_recurse_up("encoder")
            self._last_key, self._caps = 0, ""
        bus = pipeline.get_parent().get_bus()
        bus.enable_sync_message_emission()
        bus.connect("sync-message::error", self._look_at, self._encoder)
        media.connect("unprepared", self._forget, source)

    def send(self, image: npt.NDArray[np.uint8]) -> None:
        """Send a frame to all viewers, or nothing if there are none. Never waits for them.

        Shapes:
            image: uint8 [H, W, 3]; H and W even.
        """
        height, width = image.shape[:2]
        # FFmpeg studies a stream that names no rate for a second; frames come when they come.
        caps = f"video/x-raw,format={self._format},width={width},height={height},framerate=30/1"
        with self._lock:
            source = self._source
            if source is None:
                return
            base_time = source.get_base_time()
            if not base_time or source.get_state(0)[1] != self._gst.State.PLAYING:
                return  # a time stamp of this moment would lie hours ahead, and be waited for
            buffer = buffer_of(self._gst, image)
            if self._caps != caps:
                self._caps = caps
                source.set_property("caps", self._gst.Caps.from_string(caps))
            buffer.pts = max(self._gst.SystemClock.obtain().get_time() - base_time, 0)
            source.emit("push-buffer", buffer)
            self._ask_for_key_frame()

    def _ask_for_key_frame(self) -> None:
        """Each second, however few frames there are: a new viewer sees nothing before one."""
        clock = self._gst.SystemClock.obtain().get_time()
        if clock - self._last_key >= _KEY_EVERY:
            self._last_key = clock
            structure = self._gst.Structure.new_from_string(
                "GstForceKeyUnit, all-headers=(boolean)true, count=(uint)0"
            )
            event = self._gst.Event.new_custom(self._gst.EventType.CUSTOM_UPSTREAM, structure)
            self._encoder.get_static_pad("src").send_event(event)

    def _look_at(self, _bus: Any, message: Any, encoder: Any) -> None:
        """An element failed; called in a thread of its own."""
        replace, source = self.replace, message.src
        if replace is not None and (source == encoder or source.has_as_ancestor(encoder)):
            self.replace = None
            replace(message.parse_error()[0].message)

    def _forget(self, _media: Any, element: Any) -> None:
        with self._lock:
            if self._source is element:
                self._source = self._encoder = None


class RtspServer:
    """Listens at an address, in a thread of its own, until it is closed or forgotten."""

    def __init__(self, name: str, address: Address) -> None:
        self._media, self._library = load(), load_server()
        self._gst = self._media.Gst
        self._name, self._address = name, address
        self._server = self._library.GstRtspServer.RTSPServer()
        self._server.set_address(address.host)
        self._server.set_service(str(address.port))
        self._server.get_session_pool().set_max_sessions(_MOST_VIEWERS)
        self._server.set_content_length_limit(_LONGEST_BODY)
        self._server.set_backlog(_BACKLOG)
        if address.login is not None:
            self._server.set_auth(_auth(self._library, address.login))
        self._channels: list[Channel] = []
        visitors = Visitors()
        self._server.connect("client-connected", _greet, self._channels, visitors)
        loop = _Loop(self._library, self._server, name, self._channels, visitors)
        self._part, self.port = loop.part, int(self._server.get_bound_port())
        self.close = weakref.finalize(self, loop.stop)

    def add(self, path: str, size_hw: tuple[int, int], channel_order: str) -> Channel:
        """Serve another path."""
        encoding = working_encoding(self._gst, size_hw, self._name)
        channel = Channel(self._gst, channel_order)
        factory = self._library.GstRtspServer.RTSPMediaFactory()
        factory.set_launch(_launch(encoding))
        factory.set_shared(True)
        factory.connect("media-configure", channel.configure)
        gst, name, part = self._gst, self._name, self._part

        def replace(problem: str) -> None:
            leave(encoding.element, problem)
            factory.set_launch(_launch(encoding_for(gst, size_hw, name)))
            part()

        channel.replace = replace if encoding.element in NVIDIA else None
        if self._address.login is not None:
            permissions = self._library.GstRtspServer.RTSPPermissions()
            for right in _RIGHTS:
                permissions.add_permission_for_role(_ROLE, right, True)
            factory.set_permissions(permissions)
        self._channels.append(channel)
        self._server.get_mount_points().add_factory(path, factory)
        return channel


def _launch(encoding: Encoding) -> str:
    """The text of a pipeline."""
    return (
        "( appsrc name=frames is-live=true format=time block=false max-buffers=2 max-bytes=0 "
        f"leaky-type=downstream ! {encoding.text} ! "
        "rtph264pay name=pay0 pt=96 config-interval=-1 )"
    )


class _Loop:
    """The thread in which a server hears of its viewers; holds no reference to its owner."""

    def __init__(
        self,
        library: Server,
        server: Any,
        name: str,
        channels: Sequence[Channel],
        visitors: Visitors,
    ) -> None:
        self._library, self._server, self._visitors = library, server, visitors
        self._channels = channels
        self._looks = 0
        self._context = library.GLib.MainContext.new()
        self._stopped = threading.Event()
        self._sources = [self._listen(name), self._cleaning()]
        self._thread = threading.Thread(target=self._run, name=f"serve {name}", daemon=True)
        self._thread.start()

    def part(self) -> None:
        """Part with all viewers soon, in this loop's thread; they may come again."""
        source = self._library.GLib.idle_source_new()
        source.set_callback(self._remove_clients)
        source.attach(self._context)

    def stop(self) -> None:
        """Part with all viewers and free the port."""
        self._stopped.set()
        self._context.wakeup()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLEAN_EVERY)

    def _listen(self, name: str) -> Any:
        from gi.repository import GLib

        try:
            source = self._server.create_source(None)
        except GLib.Error as exc:
            raise SourceError(
                f"{name}: cannot listen there: {exc.message}. Choose another port, or end the "
                "program that uses it; ss -ltnp names it."
            ) from None
        source.attach(self._context)
        return source

    def _cleaning(self) -> Any:
        source = self._library.GLib.timeout_source_new(1000 // _LOOKS_PER_SECOND)
        source.set_callback(self._clean)
        source.attach(self._context)
        return source

    def _clean(self, *_: object) -> bool:
        self._visitors.look()
        self._looks += 1
        if self._looks % (_CLEAN_EVERY * _LOOKS_PER_SECOND) == 0:
            self._server.get_session_pool().cleanup()
        return True

    def _run(self) -> None:
        self._context.push_thread_default()
        while not self._stopped.is_set():
            self._context.iteration(True)
        for source in self._sources:
            source.destroy()
        self._remove_clients()
        last = time.monotonic() + _ENDS_WITHIN  # pipelines end in threads of their own
        while any(channel.is_watched for channel in self._channels) and time.monotonic() < last:
            self._context.iteration(False)
            time.sleep(0.005)
        self._context.pop_thread_default()

    def _remove_clients(self, *_: object) -> bool:
        remove = self._library.GstRtspServer.RTSPFilterResult.REMOVE
        self._server.client_filter(lambda _server, _client: remove)
        return False


def _greet(_server: Any, client: Any, channels: Sequence[Channel], visitors: Visitors) -> None:
    """Somebody connected; when he presses play, he shall not have to wait for a key frame."""
    visitors.take(client)

    def play(*_: object) -> None:
        for channel in channels:
            channel.welcome()

    client.connect("play-request", play)


def _auth(library: Server, login: tuple[str, str]) -> Any:
    """Let in whoever knows the password; it never crosses the wire (digest)."""
    token = library.GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", _ROLE)
    auth = library.GstRtspServer.RTSPAuth()
    auth.set_supported_methods(library.GstRtsp.RTSPAuthMethod.DIGEST)
    auth.add_digest(*login, token)
    return auth


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
