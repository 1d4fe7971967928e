"""Overlays as a network camera, ``rtsp://@:8554/seg``, and what this machine has for that."""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import os
import re
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError, BackendUnavailableError, SourceError
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.conversion import encodable
from zsseg_rt.stream.gstreamer.library import (
    Server,
    load,
    load_server,
    missing_elements,
    packages_of,
    require_elements,
)
from zsseg_rt.stream.gstreamer.pipelines import CSI_ELEMENTS, decoder_of, rtsp_elements
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.source import shown
from zsseg_rt.stream.writers import Tags, Writer, frame_of

_FORM = re.compile(
    r"rtsp://(?P<login>[^/?#]*)@(?P<host>[^/?#@:\[\]]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)"
)
_PORT = 8554


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a stream is served."""

    host: str  # The address to listen at; "0.0.0.0" is every one of this machine
    port: int  # The port; 0 takes any that is free
    path: str  # As in "/seg"
    login: tuple[str, str] | None = field(default=None, repr=False)  # User and password, or None

    @staticmethod
    def parse(text: str) -> Address:
        match = _FORM.fullmatch(text)
        login = match["login"] if match else ""
        user, password = (unquote(part) for part in login.partition(":")[::2])
        port = int(match["port"] or _PORT) if match else 0
        if match is None or port > 65535 or (login and not (user and password)):
            raise ArgumentError(
                "sink: expected rtsp://@:PORT/NAME, rtsp://@127.0.0.1:PORT/NAME for this machine "
                f"alone, or rtsp://USER:PASSWORD@:PORT/NAME; got {shown(text)}"
            )
        return Address(
            host=match["host"].strip("[]") or "0.0.0.0",
            port=port,
            path=match["path"],
            login=(user, password) if user else None,
        )

    def shown(self, port: int | None = None) -> str:
        """The address without its login, with the port that was had in the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = "***" if self.login else ""
        return f"rtsp://{login}@{host}:{self.port if port is None else port}{self.path}"

    @property
    def is_open(self) -> bool:
        """Whether other machines may watch without a password."""
        here = self.host.startswith("127.") or self.host in ("localhost", "::1")
        return self.login is None and not here


def network_of(peer: str) -> str:
    """The address that counts as one client: of IPv6 a network of 64 bits, all of which it has."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


NVENC = Path("/dev/v4l2-nvenc")  # a Jetson's encoder; an Orin Nano has none
BITS_PER_PIXEL = 0.15  # overlays have hard edges, which take more than a plain picture
OUTPUT_ELEMENTS = ("appsrc", "videoconvert", "x264enc", "rtph264pay")
_RATE = 30
_TRIAL = 10 * 10**9  # nanoseconds; the first picture makes a CUDA context
_log = logging.getLogger(__name__)


class _Encoder(NamedTuple):
    """An encoder of NVIDIA's, which may be there and not work."""

    element: str
    needs: tuple[str, ...]  # other elements
    text: str  # from raw video in the CPU's memory
    sides: tuple[int, int]  # the shortest and the longest that it takes


_ENCODERS = (
    _Encoder(
        "nvv4l2h264enc",
        ("nvvidconv", "h264parse", "videotestsrc"),
        "videoconvert ! video/x-raw,format=BGRx ! nvvidconv ! video/x-raw(memory:NVMM),format=NV12 "
        "! nvv4l2h264enc name=encoder bitrate={bits} insert-sps-pps=true "
        f"idrinterval={_RATE} iframeinterval={_RATE} ! h264parse",
        (1, 1 << 30),
    ),
    _Encoder(
        "nvh264enc",
        ("h264parse", "videotestsrc"),
        "videoconvert ! video/x-raw,format=NV12 ! nvh264enc name=encoder bitrate={kilobits} "
        f"gop-size={_RATE} zerolatency=true ! h264parse",
        (160, 4096),
    ),
)
_failed: set[str] = set()  # elements that are there and do not encode


def _encoders(gst: Any, size_hw: tuple[int, int]) -> list[_Encoder]:
    """Those that may encode images of a size here, the best first."""
    return [
        one
        for one in _ENCODERS
        if one.element not in _failed
        and (one.element != "nvv4l2h264enc" or NVENC.exists())
        and not missing_elements(gst, (one.element, *one.needs))
        and one.sides[0] <= min(size_hw) <= max(size_hw) <= one.sides[1]
    ]


def encoder_of(gst: Any) -> str:
    """The element that encodes images of usual sizes."""
    return next((one.element for one in _encoders(gst, (720, 1280))), "x264enc")


def _encoding(gst: Any, size_hw: tuple[int, int], name: str) -> str:
    """The part of a pipeline that encodes with little delay; NVIDIA's encoders are tried first."""
    bits = max(int(size_hw[0] * size_hw[1] * _RATE * BITS_PER_PIXEL), 500_000)
    for one in _encoders(gst, size_hw):
        text = one.text.format(bits=bits, kilobits=bits // 1000)
        problem = _what_fails(gst, text, size_hw)
        if problem is None:
            return text
        _failed.add(one.element)
        _log.warning("%s cannot be used: %s. Another encoder is taken", one.element, problem)
    require_elements(gst, OUTPUT_ELEMENTS, name)
    if not (_failed or missing_elements(gst, ("nvvidconv",))):
        _failed.add("nvv4l2h264enc")
        _log.warning("this Jetson has no encoder (%s): x264enc encodes on the CPU", NVENC)
    # Of more threads each encodes a slice, and FFmpeg shows some of those as green pictures.
    return (
        "videoconvert ! video/x-raw,format=I420 ! x264enc name=encoder tune=zerolatency "
        f"speed-preset=superfast threads=1 key-int-max={_RATE} bitrate={bits // 1000}"
    )


def _what_fails(gst: Any, encoding: str, size_hw: tuple[int, int]) -> str | None:
    """Encode an image; returns what kept it from that."""
    height, width = size_hw
    caps = f"video/x-raw,format=RGB,width={width},height={height},framerate={_RATE}/1"
    end = "fakesink name=end sync=false"
    from gi.repository import GLib

    try:
        trial = gst.parse_launch(f"videotestsrc num-buffers=1 ! {caps} ! {encoding} ! {end}")
    except GLib.Error as exc:  # an element of a version without one of these settings
        return str(exc.message)
    trial.set_state(gst.State.PLAYING)
    wanted = gst.MessageType.ERROR | gst.MessageType.EOS
    message = trial.get_bus().timed_pop_filtered(_TRIAL, wanted)
    encoded = trial.get_by_name("end").get_property("last-sample")
    trial.set_state(gst.State.NULL)
    if message is not None and message.type == gst.MessageType.ERROR:
        return str(message.parse_error()[0].message)
    return "it encoded nothing" if message is None or encoded is None else None


_MOST_VIEWERS = 32
_LONGEST_BODY = 1 << 16  # bytes, of a request; GStreamer reads it before it asks for the password
_BACKLOG = 64  # connections that wait to be taken; of five, a few silent ones keep all others out
_LOOKS_PER_SECOND = 4
_ENDS_WITHIN = 1.5  # seconds; less than a stop waits
_KEY_EVERY = 1.0  # seconds; how long a new viewer waits for a picture
_ROLE = "viewer"
_RIGHTS = ("media.factory.access", "media.factory.construct")


class Channel:
    """The stream of one path. Frames are sent by one thread, viewers come in others."""

    def __init__(self, gst: Any, channel_order: str) -> None:
        self._gst, self._format = gst, channel_order.upper()
        self._lock = threading.Lock()
        self._source: Any = None  # the appsrc, while somebody watches
        self._caps = ""
        self._encoder: Any = None
        self._last_key = float("-inf")

    def welcome(self, *_: object) -> None:
        """Let the next frame be one that a new viewer can begin with."""
        self._last_key = float("-inf")

    @property
    def is_watched(self) -> bool:
        return self._source is not None

    def configure(self, _factory: Any, media: Any) -> None:
        """The first viewer came; called in a thread of the server."""
        pipeline = media.get_element()
        with self._lock:
            source = self._source = pipeline.get_by_name_recurse_up("frames")
            self._encoder = pipeline.get_by_name_recurse_up("encoder")
            self._last_key, self._caps = float("-inf"), ""
        media.connect("unprepared", self._forget, source)

    def send(self, image: npt.NDArray[np.uint8]) -> None:
        """Send a frame, uint8 [H, W, 3] with even sides, to all viewers; waits for none."""
        from gi.repository import GLib

        height, width = image.shape[:2]
        # FFmpeg studies a stream that names no rate for a second; frames come when they come.
        caps = f"video/x-raw,format={self._format},width={width},height={height},framerate=30/1"
        with self._lock:
            source = self._source
            if source is None:
                return
            if source.get_state(0)[1] != self._gst.State.PLAYING:
                return  # it has no clock yet to stamp frames with
            rows = image.reshape(height, -1)
            if padding := -3 * width % 4:  # GStreamer's rows begin at multiples of 4 bytes
                rows = np.pad(rows, ((0, 0), (0, padding)))
            buffer = self._gst.Buffer.new_wrapped_bytes(GLib.Bytes.new(rows.tobytes()))
            if self._caps != caps:
                self._caps = caps
                source.set_property("caps", self._gst.Caps.from_string(caps))
            source.emit("push-buffer", buffer)
            self._ask_for_key_frame()

    def _ask_for_key_frame(self) -> None:
        """Each second, however few frames there are: a new viewer sees nothing before one."""
        if (now := time.monotonic()) - self._last_key >= _KEY_EVERY:
            self._last_key = now
            structure = self._gst.Structure.new_from_string(
                "GstForceKeyUnit, all-headers=(boolean)true, count=(uint)0"
            )
            event = self._gst.Event.new_custom(self._gst.EventType.CUSTOM_UPSTREAM, structure)
            self._encoder.get_static_pad("src").send_event(event)

    def _forget(self, _media: Any, element: Any) -> None:
        with self._lock:
            if self._source is element:
                self._source = self._encoder = None


def _configured(library: Server, address: Address) -> Any:
    server = library.GstRtspServer.RTSPServer()
    server.set_address(address.host)
    server.set_service(str(address.port))
    server.get_session_pool().set_max_sessions(_MOST_VIEWERS)
    server.set_content_length_limit(_LONGEST_BODY)
    server.set_backlog(_BACKLOG)
    if address.login is not None:  # whose password never crosses the wire
        token = library.GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", _ROLE)
        auth = library.GstRtspServer.RTSPAuth()
        auth.set_supported_methods(library.GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(*address.login, token)
        server.set_auth(auth)
    return server


def _serve(library: Server, address: Address, channels: Sequence[Channel]) -> tuple[Any, Any]:
    """Serve in a thread that holds no reference to the owner; the server, and what ends it."""
    server, visitors = _configured(library, address), Visitors()

    def greet(_server: Any, client: Any) -> None:
        visitors.take(client)
        for channel in channels:
            client.connect("play-request", channel.welcome)

    server.connect("client-connected", greet)
    glib, stopped = library.GLib, threading.Event()
    context = glib.MainContext.new()
    try:
        listening = server.create_source(None)
    except glib.Error as exc:
        raise SourceError(
            f"{address.shown()}: cannot listen there: {exc.message}. Choose another port, or end "
            "the program that uses it; ss -ltnp names it."
        ) from None

    def clean(*_: object) -> bool:
        visitors.look()
        server.get_session_pool().cleanup()  # of viewers over UDP that vanished a minute ago
        return True

    cleaning = glib.timeout_source_new(1000 // _LOOKS_PER_SECOND)
    cleaning.set_callback(clean)
    listening.attach(context)
    cleaning.attach(context)

    def run() -> None:
        context.push_thread_default()
        while not stopped.is_set():
            context.iteration(True)
        listening.destroy()
        cleaning.destroy()
        _part(library, server, channels, context)
        context.pop_thread_default()

    thread = threading.Thread(target=run, name=f"serve {address.shown()}", daemon=True)

    def stop() -> None:
        stopped.set()
        context.wakeup()
        if threading.current_thread() is not thread:
            thread.join(_ENDS_WITHIN + 0.5)

    thread.start()
    return server, stop


def _part(library: Server, server: Any, channels: Sequence[Channel], context: Any) -> None:
    remove = library.GstRtspServer.RTSPFilterResult.REMOVE
    server.client_filter(lambda *_: remove)
    last = time.monotonic() + _ENDS_WITHIN  # pipelines end in threads of their own
    while any(channel.is_watched for channel in channels) and time.monotonic() < last:
        context.iteration(False)
        time.sleep(0.005)


_MOST = 64  # connections
_MOST_PER_ADDRESS = 32
UNTIL_SETUP = 10.0  # seconds that a visitor may take to begin a session
# What viewers send: a few requests, and some hundred bytes of reports every few seconds.
_BURST, _BYTE_RATE = 1 << 16, 1 << 11  # bytes, bytes per second
_UNREAD = 1 << 14  # bytes that the kernel keeps for a connection; it doubles them


@dataclass(eq=False)
class _Visitor:
    socket: Callable[[], Any]  # a Gio.Socket, which closes when nobody holds it, or None
    address: str
    came_at: float
    has_session: bool = False
    is_handed_over: bool = False  # to the other half of a tunnel through HTTP

    def send_away(self) -> None:
        """Break the connection off at once: an end would come after all that is still sent."""
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
        client.connect("new-session", lambda *_: setattr(visitor, "has_session", True))
        client.connect("closed", lambda *_: setattr(visitor, "is_handed_over", True))
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
            is_silent = not is_viewer and age > UNTIL_SETUP
            if is_silent or _received(visitor.socket()) > _BURST + _BYTE_RATE * age:
                visitor.send_away()


def _received(gio_socket: Any) -> int:
    """Bytes that have come in over a connection; 0 if it is closed, and before Linux 4.1."""
    if gio_socket is None:
        return 0
    try:
        with socket.socket(fileno=os.dup(gio_socket.get_fd())) as same:
            facts = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    except OSError:
        return 0
    return int.from_bytes(facts[128:136], sys.byteorder)


class RtspSink(Writer):
    """Serves each frame with its labels' colours laid over it, as H.264 over RTSP.

    Nothing is painted or encoded unless somebody watches. A source with a tag has a path of its
    own, ``/seg-TAG``; each path is there from the source's first frame on.
    """

    def __init__(self, text: str, *, painter: Painter, tags: Tags) -> None:
        self._address, self._tags = Address.parse(text), tags
        self._gst, self._library = load().Gst, load_server()
        if encoder_of(self._gst) == "x264enc":
            require_elements(self._gst, OUTPUT_ELEMENTS, self._address.shown())
        self._served: list[Channel] = []
        self._server, stop = _serve(self._library, self._address, self._served)
        self._stop = weakref.finalize(self, stop)
        self.port = int(self._server.get_bound_port())
        super().__init__(self._address.shown(self.port))
        self.painter = painter
        self._size_hw: tuple[int, ...] = ()
        self._channels: dict[str, Channel] = {}
        self._canvas = np.empty((0, 0, 3), np.uint8)
        if self._address.is_open:
            _log.warning(
                "%s: anyone who can reach this port can watch. rtsp://@127.0.0.1:PORT/NAME is for "
                "this machine alone, rtsp://USER:PASSWORD@:PORT/NAME asks for a password.",
                self.name,
            )

    def write(self, seg: Segmentation) -> None:
        frame = frame_of(seg)
        if self._size_hw != seg.labels.shape:
            self._canvas, self._size_hw = self.painter.canvas(seg), seg.labels.shape
        height, width = encodable(self._canvas).shape[:2]
        padding = ((0, height % 2), (0, width % 2), (0, 0))
        channel = self._channels.get(frame.source)
        if channel is None:
            channel = self._add(frame, (height + height % 2, width + width % 2))
        if channel.is_watched:
            self.painter.paint(seg, self._canvas)
            channel.send(np.pad(encodable(self._canvas), padding, mode="edge"))

    def close(self) -> None:
        self._stop()

    def _add(self, frame: Frame, size_hw: tuple[int, int]) -> Channel:
        encoding = _encoding(self._gst, size_hw, self._address.shown())
        channel = self._channels[frame.source] = Channel(self._gst, self.painter.channel_order)
        factory = self._library.GstRtspServer.RTSPMediaFactory()
        factory.set_launch(
            "( appsrc name=frames is-live=true format=time do-timestamp=true max-buffers=2 "
            f"max-bytes=0 leaky-type=downstream ! {encoding} ! "
            "rtph264pay name=pay0 pt=96 config-interval=-1 )"
        )
        factory.set_shared(True)
        factory.connect("media-configure", channel.configure)
        if self._address.login is not None:
            permissions = self._library.GstRtspServer.RTSPPermissions()
            for right in _RIGHTS:
                permissions.add_permission_for_role(_ROLE, right, True)
            factory.set_permissions(permissions)
        self._served.append(channel)
        path = self._tags.join(self._address.path, frame.source)
        self._server.get_mount_points().add_factory(path, factory)
        self.whose[self._tags.join(self.name, frame.source)] = frame.source
        return channel


_JETSON_CODECS = ("nvv4l2decoder", "nvv4l2h264enc")


def report(*, is_jetson: bool) -> tuple[str, str]:
    """The parts of GStreamer that are here, and how to install the rest; opens nothing."""
    try:
        library = load()
    except BackendUnavailableError as exc:
        text, _, remedy = str(exc).partition(" Run: ")
        need = "Only csi://, gst:, RTSP output and RTSP with less delay need it."
        return f"{text} {need}", f"Run: {remedy}"
    import gi

    gst, facts = library.Gst, [f"{library.version}, PyGObject {gi.__version__}"]
    remedies: list[str] = []
    wanted = [*rtsp_elements(gst), *OUTPUT_ELEMENTS]
    if is_jetson:
        wanted += [*CSI_ELEMENTS, *_JETSON_CODECS]
    missing = missing_elements(gst, dict.fromkeys(wanted))
    if missing:
        facts.append(f"missing: {', '.join(missing)}")
        remedies.append(packages_of(missing))
    facts.append(f"H.264 is decoded by {decoder_of(gst, 'H264')[0]}")
    facts.append(f"encoded by {encoder_of(gst)}")
    if is_jetson and not NVENC.exists():
        facts.append(f"no {NVENC}: this Jetson has no encoder, or a container does not pass it on")
    try:
        load_server()
    except BackendUnavailableError as exc:
        facts.append("RTSP cannot be served")
        remedies.append(str(exc))
    return "; ".join(facts), " ".join(dict.fromkeys(remedies))
