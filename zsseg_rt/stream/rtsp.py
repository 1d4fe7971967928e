"""Network cameras over RTSP, read with GStreamer where it is present, else with PyAV."""

from __future__ import annotations

import functools
import logging
import os
import re

from zsseg_rt.errors import BackendUnavailableError, ConfigError
from zsseg_rt.stream.gstreamer.library import load, require_elements
from zsseg_rt.stream.gstreamer.pipelines import RtspCamera, decoder_of, rtsp_elements
from zsseg_rt.stream.gstreamer.source import GstSource
from zsseg_rt.stream.source import Source
from zsseg_rt.stream.video import VideoSource

_LIBRARIES = ("auto", "gstreamer", "pyav")
_PROTOCOLS = {"tcp": "tcp", "udp": "udp", "udp-mcast": "udp_multicast", "http": "http"}  # FFmpeg's
_log = logging.getLogger(__name__)


def rtsp_settings() -> tuple[str, tuple[str, ...], int | None]:
    """Library, protocols and milliseconds that a packet is waited for, as ``ZSSEG_RTSP_*`` say."""
    library = os.environ.get("ZSSEG_RTSP_LIBRARY") or "auto"
    names = os.environ.get("ZSSEG_RTSP_PROTOCOLS") or "tcp"
    latency = os.environ.get("ZSSEG_RTSP_LATENCY_MS") or ""
    protocols = tuple(dict.fromkeys(part.strip() for part in names.split(",")))
    is_wait = re.fullmatch("[0-9]{0,5}", latency) and int(latency or 0) <= 60_000
    some, one = ", ".join(_PROTOCOLS), ", ".join(_LIBRARIES)
    for fits, name, text in (
        (library in _LIBRARIES, "LIBRARY", f"one of {one}, got {library!r}"),
        (set(protocols) <= set(_PROTOCOLS), "PROTOCOLS", f"some of {some}, got {names!r}"),
        (is_wait, "LATENCY_MS", f"milliseconds from 0 to 60000, got {latency!r}"),
    ):
        if not fits:
            raise ConfigError(f"ZSSEG_RTSP_{name}: expected {text}")
    return library, protocols, int(latency) if latency else None


def rtsp_source(url: str, name: str, channel_order: str) -> Source:
    """A network camera, as the library that was chosen reads it; says which, once."""
    library, protocols, latency_ms = rtsp_settings()
    if library == "auto" and url.startswith("rtsps:"):
        library = "pyav"  # GStreamer refuses the certificates that cameras sign themselves
    try:
        if library != "pyav":
            return _through_gstreamer(url, name, channel_order, protocols, latency_ms)
    except BackendUnavailableError as exc:
        if library == "gstreamer":
            raise
        tell_once(f"rtsp: read with PyAV, since GStreamer is not complete: {exc}")
    else:
        tell_once("rtsp: read with PyAV")
    options = {"rtsp_transport": "+".join(_PROTOCOLS[one] for one in protocols)}
    if latency_ms is not None:
        options["max_delay"] = str(latency_ms * 1000)
    return VideoSource(
        name=name, url=url, kind="rtsp", channel_order=channel_order, options=options
    )


def _through_gstreamer(
    url: str, name: str, order: str, protocols: tuple[str, ...], latency_ms: int | None
) -> Source:
    library = load()
    require_elements(library.Gst, rtsp_elements(library.Gst), "rtsp")
    decoder = decoder_of(library.Gst, "H264")[0]
    tell_once(f"rtsp: read with GStreamer {library.version}, H.264 decoded by {decoder}")
    latency = {} if latency_ms is None else {"latency_ms": latency_ms}
    recipe = RtspCamera(url=url, protocols=protocols, **latency)
    return GstSource(name=name, recipe=recipe, channel_order=order)


@functools.cache
def tell_once(text: str) -> None:
    """Log which library was chosen."""
    _log.info("%s. ZSSEG_RTSP_LIBRARY chooses another.", text)
