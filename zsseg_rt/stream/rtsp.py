"""Network cameras over RTSP, read with GStreamer where it is present, else with PyAV."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal, get_args

from zsseg_rt.errors import BackendUnavailableError, ConfigError
from zsseg_rt.stream.source import Picture, Reader, Source
from zsseg_rt.stream.video import VideoSource

Library = Literal["auto", "gstreamer", "pyav"]

_PROTOCOLS = {"tcp": "tcp", "udp": "udp", "udp-mcast": "udp_multicast", "http": "http"}  # FFmpeg's
_LONGEST_LATENCY = 60_000  # ms
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RtspSettings:
    """How network cameras are read; the environment's to say."""

    # What reads them; "auto" takes GStreamer where its elements are present
    library: Library = "auto"
    # What may carry the packets: "tcp", "udp", "udp-mcast", "http"
    protocols: tuple[str, ...] = ("tcp",)
    # How long a missing packet is waited for; None is the library's default
    latency_ms: int | None = None

    @staticmethod
    def from_environment() -> RtspSettings:
        """As ``ZSSEG_RTSP_LIBRARY``, ``ZSSEG_RTSP_PROTOCOLS``, ``ZSSEG_RTSP_LATENCY_MS`` say."""
        library = os.environ.get("ZSSEG_RTSP_LIBRARY") or "auto"
        known = get_args(Library)
        if library not in known:
            raise ConfigError(
                f"ZSSEG_RTSP_LIBRARY: expected one of {', '.join(known)}, got {library!r}"
            )
        given = os.environ.get("ZSSEG_RTSP_PROTOCOLS") or "tcp"
        protocols = tuple(dict.fromkeys(part.strip() for part in given.split(",")))
        if not set(protocols) <= set(_PROTOCOLS):
            raise ConfigError(
                f"ZSSEG_RTSP_PROTOCOLS: expected some of {', '.join(_PROTOCOLS)}, got {given!r}"
            )
        return RtspSettings(
            library=library,  # type: ignore[arg-type]  # checked above
            protocols=protocols,
            latency_ms=_latency(os.environ.get("ZSSEG_RTSP_LATENCY_MS") or ""),
        )


@dataclass(frozen=True, kw_only=True)
class RtspSource:
    """A network camera."""

    name: str  # The URI without a password
    url: str = field(repr=False)  # The URI
    channel_order: str = "rgb"  # Of the frames
    settings: RtspSettings = field(default_factory=RtspSettings)  # How it is read
    # As of GstSource, like refusals
    device: str = "cpu"
    refusals: list[str] = field(default_factory=list, repr=False)
    live = True

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Read it with the library that was chosen; says which, once."""
        yield from self.choose().pictures(reader)

    def choose(self) -> Source:
        """The source that reads it."""
        try:
            if self.settings.library != "pyav" and not self._keeps_to_pyav():
                return self._through_gstreamer()
        except BackendUnavailableError as exc:
            if self.settings.library == "gstreamer":
                raise
            _tell_once(f"rtsp: read with PyAV, since GStreamer is not complete: {exc}")
        else:
            _tell_once("rtsp: read with PyAV")
        return self._through_pyav()

    def _keeps_to_pyav(self) -> bool:
        """GStreamer refuses the certificates that cameras sign themselves; FFmpeg takes them."""
        return self.settings.library == "auto" and self.url.lower().startswith("rtsps:")

    def _through_gstreamer(self) -> Source:
        from zsseg_rt.stream.gstreamer.library import load, require_elements
        from zsseg_rt.stream.gstreamer.pipelines import (
            RtspCamera,
            decoder_of,
            path_of_decoder,
            rtsp_elements,
        )
        from zsseg_rt.stream.gstreamer.source import GstSource, keeps_to_host

        library = load()
        require_elements(library.Gst, rtsp_elements(library.Gst), "rtsp")
        is_on_host = self.device == "cpu" or self.refusals or keeps_to_host()
        path = "host" if is_on_host else path_of_decoder(library.Gst)
        decoder = decoder_of(library.Gst, "H264", path)[0]
        _tell_once(f"rtsp: read with GStreamer {library.version}, H.264 decoded by {decoder}")
        latency = self.settings.latency_ms
        recipe = RtspCamera(
            url=self.url,
            protocols=self.settings.protocols,
            **({} if latency is None else {"latency_ms": latency}),
        )
        return GstSource(
            name=self.name,
            recipe=recipe,
            channel_order=self.channel_order,
            device=self.device,
            refusals=self.refusals,
        )

    def _through_pyav(self) -> Source:
        options = {"rtsp_transport": "+".join(_PROTOCOLS[p] for p in self.settings.protocols)}
        if self.settings.latency_ms is not None:
            options["max_delay"] = str(self.settings.latency_ms * 1000)
        return VideoSource(
            name=self.name,
            url=self.url,
            kind="rtsp",
            channel_order=self.channel_order,
            options=options,
            device=self.device,
        )


def _latency(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) <= _LONGEST_LATENCY):
        raise ConfigError(
            f"ZSSEG_RTSP_LATENCY_MS: expected milliseconds from 0 to {_LONGEST_LATENCY}, got "
            f"{text!r}"
        )
    return int(text)


@functools.cache
def _tell_once(text: str) -> None:
    _log.info("%s. ZSSEG_RTSP_LIBRARY chooses another.", text)
