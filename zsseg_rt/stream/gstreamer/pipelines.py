"""Pipelines that end in raw frames: of CSI cameras, and of the user's own making."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.stream.gstreamer.frames import Arrivals
from zsseg_rt.stream.gstreamer.library import (
    known_settings,
    missing_elements,
    packages_of,
    require_elements,
)
from zsseg_rt.stream.gstreamer.messages import explain, redact_pipeline

CSI_ELEMENTS = ("nvarguscamerasrc", "nvvidconv", "videoconvert", "appsink")


class Connections:
    """The TCP connections that are opened to a camera from now on, which rtspsrc keeps to itself.

    rtspsrc takes whatever a camera sends before its pictures, and never ends while more comes.

    Args:
        url: Where the camera is, without a login.
    """

    def __init__(self, url: str) -> None:
        self._before, self._peers = set(_sockets()), set[tuple[Any, ...]]()
        with suppress(OSError, ValueError):  # rtspsrc says what is wrong
            place = urlsplit(url)
            found = socket.getaddrinfo(place.hostname, place.port or 554, type=socket.SOCK_STREAM)
            self._peers = {address[:2] for *_, address in found}

    def received(self) -> int:
        """Bytes that came over those that are open."""
        infos = [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136) for one in self._open()]
        return sum(int.from_bytes(info[128:136], sys.byteorder) for info in infos)

    def cut(self) -> None:
        """End them all."""
        for one in self._open():
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _open(self) -> Iterator[socket.socket]:
        for link, number in _sockets().items():
            with suppress(OSError):
                if link not in self._before:
                    with socket.socket(fileno=os.dup(number)) as one:
                        if one.getpeername()[:2] in self._peers:
                            yield one


def _sockets() -> dict[str, int]:
    """The descriptors of this process's sockets, by what tells sockets apart."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found[str(path.readlink())] = int(path.name)
    return {link: number for link, number in found.items() if link.startswith("socket:")}


@dataclass(kw_only=True, eq=False)
class Pipeline:
    """A pipeline that was built, not started.

    Attributes:
        element: The ``Gst.Pipeline``.
        sink: The appsink that its frames end in.
        arrivals: When its encoded frames arrived, if somebody notes that.
        problem: Tells what went wrong outside the pipeline's own messages, or None.
        forget: Disconnects what was connected to it, so that it can be freed.
        connections: Those to its camera, where they are watched.
    """

    element: Any
    sink: Any
    arrivals: Arrivals | None = None
    problem: Callable[[], ZssegError | None] = lambda: None
    forget: Callable[[], None] = lambda: None
    connections: Connections | None = None


class Recipe(Protocol):
    """How the pipeline of a source is made; anew for each attempt to open it."""

    @property
    def hint(self) -> str:
        """What to check when a camera's pipeline ends or falls silent."""

    def path(self, gst: Any) -> str:
        """Where its frames may lie on their way to a GPU: ``"nvmm"``, ``"cuda"`` or ``"host"``."""

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        """Make the pipeline.

        Args:
            gst: The namespace ``Gst``.
            name: The source's name, for messages.
            path: ``"host"``, or what :meth:`path` says.

        Raises:
            SourceError: The pipeline cannot be made.
            BackendUnavailableError: Elements are missing.
        """

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        """A message of type ``ERROR`` in our words, without passwords."""


@dataclass(frozen=True, kw_only=True)
class CsiCamera:
    """A camera on a Jetson's CSI connector, through NVIDIA's image signal processor.

    Attributes:
        sensor: The camera's number.
        size_hw: Height and width that the camera is asked for.
        rate: Frames per second.
        flip: ``flip-method`` of nvvidconv, 0 to 7.
    """

    sensor: int
    size_hw: tuple[int, int] = (720, 1280)
    rate: float = 30.0
    flip: int = 0
    hint = (
        "Check the camera's cable and that its driver is set up (jetson-io.py), and that no other "
        "program uses it; then: sudo systemctl restart nvargus-daemon."
    )

    def path(self, gst: Any) -> str:
        """See :class:`Recipe`."""
        return "host" if missing_elements(gst, CSI_ELEMENTS[:2]) else "nvmm"

    @property
    def description(self) -> str:
        """The pipeline's text up to its converter; it holds nothing but numbers."""
        height, width = self.size_hw
        rate = Fraction(self.rate).limit_denominator(1001)
        return (
            f"nvarguscamerasrc name=camera sensor-id={self.sensor} "
            f"! video/x-raw(memory:NVMM),format=NV12,width={width},height={height},"
            f"framerate={rate.numerator}/{rate.denominator} "
            f"! nvvidconv flip-method={self.flip}"
        )

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        """See :class:`Recipe`."""
        require_elements(gst, CSI_ELEMENTS, name)
        if path == "nvmm":
            return parse(gst, f"{self.description} {within_nvmm(gst)} ! appsink", name)
        text = f"{self.description} ! video/x-raw,format=BGRx ! videoconvert ! appsink"
        return parse(gst, text, name)

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        """See :class:`Recipe`."""
        return explain(gst, message, name, hint=self.hint)


@dataclass(frozen=True, kw_only=True)
class UserPipeline:
    """The user's own pipeline.

    Attributes:
        text: As for gst-launch-1.0. Unless its last element is an appsink, it is continued with
            ``! videoconvert ! appsink``.
    """

    text: str = field(repr=False)
    hint = "Check its source. If it plays a file, write gst-file: for gst:."

    def path(self, gst: Any) -> str:
        """See :class:`Recipe`."""
        return "host"

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        """See :class:`Recipe`."""
        last = self.text.rpartition("!")[2].split()
        ends = bool(last) and last[0] == "appsink"
        return parse(gst, self.text if ends else f"{self.text} ! videoconvert ! appsink", name)

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        """See :class:`Recipe`."""
        return explain(gst, message, name)


def within_nvmm(gst: Any) -> str:
    """Settings of nvvidconv for frames that stay in NVMM.

    Rows lie one after the other, not in blocks, and no buffer is missing while an appsink is full.
    """
    return known_settings(gst, "nvvidconv", {"bl-output": "false", "output-buffers": 6})


def parse(gst: Any, text: str, name: str) -> Pipeline:
    """Make a pipeline of its text."""
    from gi.repository import GLib

    context = gst.ParseContext.new()
    try:
        made = gst.parse_launch_full(text, context, gst.ParseFlags.FATAL_ERRORS)
    except GLib.Error as exc:
        missing = missing_elements(gst, dict.fromkeys(context.get_missing_elements() or ()))
        if missing:
            raise BackendUnavailableError(
                f"{name}: expected the GStreamer elements {', '.join(missing)}, found none. "
                f"{packages_of(missing)}"
            ) from None
        raise SourceError(
            f"{name}: expected a pipeline as gst-launch-1.0 takes it, got one that GStreamer "
            f"refuses: {redact_pipeline(exc.message)}. Try it there."
        ) from None
    sink = _appsink_of(gst, made)
    if sink is None:
        raise SourceError(f"{name}: expected a pipeline that ends in raw video, got a whole one")
    return Pipeline(element=made, sink=sink)


def _appsink_of(gst: Any, made: Any) -> Any:
    if not isinstance(made, gst.Bin):
        return None
    found = made.iterate_all_by_element_factory_name("appsink")
    result, sink = found.next()
    return sink if result == gst.IteratorResult.OK else None
