"""GStreamer through PyGObject: found, started once, and asked which elements it has."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from zsseg_rt.common.extras import install_command, unavailable
from zsseg_rt.errors import BackendUnavailableError

_BASE = "gstreamer1.0-plugins-base"
_GOOD = "gstreamer1.0-plugins-good"
_BAD = "gstreamer1.0-plugins-bad"
_JETSON = "nvidia-l4t-gstreamer"
_PACKAGES = {
    "appsink": _BASE,
    "appsrc": _BASE,
    "videoconvert": _BASE,
    "videoscale": _BASE,
    "videotestsrc": _BASE,
    "decodebin": _BASE,
    "jpegdec": _GOOD,
    "rtph264depay": _GOOD,
    "rtph264pay": _GOOD,
    "rtph265depay": _GOOD,
    "rtpjpegdepay": _GOOD,
    "rtspsrc": _GOOD,
    "v4l2src": _GOOD,
    "h264parse": _BAD,
    "h265parse": _BAD,
    "avdec_h264": "gstreamer1.0-libav",
    "avdec_h265": "gstreamer1.0-libav",
    "x264enc": "gstreamer1.0-plugins-ugly",
}
_TYPELIBS = "gir1.2-gst-plugins-base-1.0"
_SERVER_TYPELIB = "gir1.2-gst-rtsp-server-1.0"
_lock = threading.Lock()


class Library(NamedTuple):
    """The namespaces of PyGObject that reading needs."""

    Gst: Any
    GstVideo: Any

    @property
    def version(self) -> str:
        """As in ``"1.22.0"``."""
        return ".".join(str(part) for part in self.Gst.version()[:3])


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
    return Library(gst, video)


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


def known_settings(gst: Any, element: str, settings: Mapping[str, object]) -> str:
    """Those settings that this version of an element has."""
    made = gst.ElementFactory.make(element)
    return " ".join(f"{key}={value}" for key, value in settings.items() if made.find_property(key))


def packages_of(elements: Iterable[str]) -> str:
    """What to do about missing elements."""
    elements = list(elements)
    known = sorted({_PACKAGES[name] for name in elements if name in _PACKAGES})
    jetson = [name for name in elements if name.startswith("nv") and name not in _PACKAGES]
    others = [name for name in elements if name not in _PACKAGES and name not in jetson]
    told = []
    if known:
        told.append(f"Run: sudo apt install {' '.join(known)}")
    if jetson:
        told.append(
            f"{', '.join(jetson)}: sudo apt install {_JETSON}, on a Jetson; other machines have "
            "none of it."
        )
    if others:
        told.append(f"Is {others[0]!r} spelled as gst-inspect-1.0 lists it?")
    return " ".join(told)


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
