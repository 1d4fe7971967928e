"""GStreamer through PyGObject: which elements it has, what its messages mean, and its samples."""

from __future__ import annotations

import ctypes as c
import functools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from zsseg_rt.common.extras import install_command, unavailable
from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.stream.source import redact, shown

_ELEMENTS = {
    "gstreamer1.0-plugins-base": "appsink appsrc videoconvert videoscale videotestsrc decodebin",
    "gstreamer1.0-plugins-good": "jpegdec rtph264depay rtph264pay rtph265depay rtpjpegdepay "
    "rtspsrc v4l2src",
    "gstreamer1.0-plugins-bad": "h264parse h265parse",
    "gstreamer1.0-libav": "avdec_h264 avdec_h265",
    "gstreamer1.0-plugins-ugly": "x264enc",
}
_PACKAGES = {name: package for package, names in _ELEMENTS.items() for name in names.split()}
_TYPELIBS = "gir1.2-gst-plugins-base-1.0"
_SERVER_TYPELIB = "gir1.2-gst-rtsp-server-1.0"
_lock = threading.Lock()


class Library(NamedTuple):
    """The namespaces of PyGObject that reading needs."""

    Gst: Any
    GstVideo: Any
    version: str  # As in "1.22.0"


class Server(NamedTuple):
    """The namespaces of PyGObject that serving RTSP needs besides."""

    GLib: Any
    GstRtsp: Any
    GstRtspServer: Any


def load() -> Library:
    """Import GStreamer and start it, once."""
    with _lock:  # sources may be opened at the same moment
        gst, _, video = _import("Gst", "GstApp", "GstVideo", package=_TYPELIBS)
        gst.init(None)
    return Library(gst, video, ".".join(map(str, gst.version()[:3])))


def load_server() -> Server:
    """Import what serves RTSP."""
    load()
    glib, _, rtsp, server = _import(
        "GLib", "Gst", "GstRtsp", "GstRtspServer", package=_SERVER_TYPELIB
    )
    return Server(glib, rtsp, server)


def missing_elements(gst: Any, names: Iterable[str]) -> list[str]:
    """Those of the elements that this GStreamer has not."""
    return [name for name in names if gst.ElementFactory.find(name) is None]


def require_elements(gst: Any, names: Iterable[str], purpose: str) -> None:
    """Refuse to go on without some elements."""
    missing = missing_elements(gst, names)
    if missing:
        raise BackendUnavailableError(
            f"{purpose}: expected the GStreamer elements {', '.join(missing)}, found none. "
            f"{packages_of(missing)}"
        )


def packages_of(elements: Iterable[str]) -> str:
    """Advice that installs missing elements."""
    elements = list(elements)
    packages = sorted({_PACKAGES[name] for name in elements if name in _PACKAGES})
    others = [name for name in elements if name not in _PACKAGES]
    jetson = [name for name in others if name.startswith("nv")]
    unknown = [name for name in others if not name.startswith("nv")]
    advice = [f"Run: sudo apt install {' '.join(packages)}"] if packages else []
    if jetson:
        advice.append(
            f"{', '.join(jetson)}: sudo apt install nvidia-l4t-gstreamer, on a Jetson; other "
            "machines have none of it."
        )
    if unknown:
        advice.append(f"Is {unknown[0]!r} spelled as gst-inspect-1.0 lists it?")
    return " ".join(advice)


def _import(*namespaces: str, package: str) -> list[Any]:
    try:
        import gi
    except ImportError as exc:
        command = (
            f"sudo apt install python3-gi {_TYPELIBS}, in an environment made with "
            f"--system-site-packages; or {install_command('gstreamer')}"
        )
        raise unavailable(exc, "gi", "gi: expected PyGObject to use GStreamer", command) from exc
    from importlib import import_module

    modules = []
    for name in namespaces:
        try:
            if name != "GLib":
                gi.require_version(name, "1.0")
            modules.append(import_module(f"gi.repository.{name}"))
        except (ImportError, ValueError) as exc:
            raise BackendUnavailableError(
                f"gi: expected GStreamer's {name}, found none ({exc}). Run: sudo apt install "
                f"{package}"
            ) from exc
    return modules


_VALUE = r"""(?:\([^)]*\)\s*)?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S+)"""
_PROPERTY = re.compile(
    r"([\w-]*(?:pass|pwd|psw|pw|token|secret|key(?!-int)|auth|cookie|header|cred|login|sig(?!nal)|user)[\w-]*"
    rf"\s*=\s*){_VALUE}",
    re.IGNORECASE,
)
_SET = re.compile(r'(property "[^"]*" .* to )"(?:[^"\\]|\\.)*"')
_QUOTED = re.compile(r"""(["'])(\w[\w+.-]*://(?:(?!\1).)*)\1""")
_REMEDIES = {
    "NOT_AUTHORIZED": "Check user and password.",
    "NOT_FOUND": "Check the path.",
    "BUSY": "Close the program that uses it.",
    "OPEN_READ": "Check that it is there, and that this user may read it.",
    "OPEN_READ_WRITE": "Check address and port, and that the camera is on.",
    "READ": "Check that the camera is on.",
    "SETTINGS": "It cannot do this size, rate or format.",
}
_NOT_NEGOTIATED = (
    "One element does not take what another gives. End the pipeline in raw video: in videoconvert, "
    "on a Jetson in nvvidconv ! video/x-raw,format=BGRx."
)


def explain(gst: Any, message: Any, name: str, *, hint: str = "") -> ZssegError:
    """An error on a pipeline's bus in our words, without passwords."""
    error, debug = message.parse_error()
    detail = (debug or "").strip().splitlines()[-1:] or [""]
    detail = [] if "/Gst" in detail[0] else detail  # where in GStreamer's code, nothing else
    parts = [] if detail and detail[0].startswith(error.message) else [error.message.rstrip(". ")]
    reason = redact_pipeline(": ".join([*parts, *detail]).rstrip(". "))
    if error.matches(gst.CoreError.quark(), gst.CoreError.MISSING_PLUGIN):
        return BackendUnavailableError(
            f"{name}: {reason}. Run: sudo apt install gstreamer1.0-libav gstreamer1.0-plugins-good "
            "gstreamer1.0-plugins-bad"
        )
    remedies = [hint, _NOT_NEGOTIATED if "not-negotiated" in reason else ""]
    for key, text in _REMEDIES.items():
        if error.matches(gst.ResourceError.quark(), getattr(gst.ResourceError, key)):
            remedies.append(text)
    remedy = next(filter(None, remedies), "Check it with gst-launch-1.0.")
    element = message.src.get_name() if message.src is not None else "GStreamer"
    return SourceError(f"{name}: cannot be read: {element}: {reason}. {remedy}")


def redact_pipeline(text: str) -> str:
    """Blank out logins and secrets in the text of a pipeline."""
    text = redact(_QUOTED.sub(lambda match: match[1] + shown(match[2]) + match[1], text))
    return _SET.sub(r'\1"***"', _PROPERTY.sub(r"\1***", text))


_MAP_READ = 1  # GST_MAP_READ
_pointer = c.c_void_p


class _MapInfo(c.Structure):
    """GstMapInfo."""

    _fields_ = (
        ("memory", _pointer), ("flags", c.c_int), ("data", _pointer), ("size", c.c_size_t),
        ("maxsize", c.c_size_t), ("user_data", _pointer * 4), ("reserved", _pointer * 4),
    )  # fmt: skip


@contextmanager
def host_planes(library: Library, sample: Any) -> Iterator[tuple[list[Any], str | None]]:
    """The planes of a sample, RGB, NV12 or I420, and their colour matrix, inside the block."""
    info = library.GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    buffer = sample.get_buffer()
    meta = library.GstVideo.buffer_get_video_meta(buffer)
    layout, half = info if meta is None else meta, (info.height // 2, info.width // 2)
    shapes: list[tuple[int, ...]] = [(info.height, info.width, 3)]
    if info.finfo.name in ("NV12", "I420"):
        chroma = [(*half, 2)] if info.finfo.name == "NV12" else [half, half]
        shapes = [(info.height, info.width), *chroma]
    kinds = library.GstVideo.VideoColorMatrix
    matrix = {kinds.BT601: "bt601", kinds.BT709: "bt709"}.get(info.colorimetry.matrix)
    is_full = info.colorimetry.range.value_nick == "0-255"
    # PyGObject would copy the memory; its hash of an object is the address in C.
    core, address, memory = _gstreamer(), c.c_void_p(hash(buffer)), _MapInfo()
    if core.gst_buffer_map(address, c.byref(memory), _MAP_READ) != 1:
        raise SourceError("gst_buffer_map: refused")
    try:
        data = np.ctypeslib.as_array((c.c_uint8 * memory.size).from_address(memory.data))
        planes = [
            np.lib.stride_tricks.as_strided(data[offset:], shape, (stride, *shape[2:], 1))
            for shape, stride, offset in zip(shapes, layout.stride, layout.offset, strict=False)
        ]
        yield planes, f"{matrix}-full" if matrix and is_full else matrix
    finally:
        core.gst_buffer_unmap(address, c.byref(memory))


@functools.cache
def _gstreamer() -> c.CDLL:
    return c.CDLL("libgstreamer-1.0.so.0")
