"""Network cameras over RTSP, read with GStreamer where it is present, else with PyAV."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal, get_args

from zsseg_rt.errors import BackendUnavailableError, ConfigError
from zsseg_rt.stream.source import Picture, Reader, Source
from zsseg_rt.stream.video import VideoSource

Library = Literal["auto", "gstreamer", "pyav"]

_PROTOCOLS = {"tcp": "tcp", "udp": "udp", "udp-mcast": "udp_multicast", "http": "http"}  # FFmpeg's
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
        names = os.environ.get("ZSSEG_RTSP_PROTOCOLS") or "tcp"
        latency = os.environ.get("ZSSEG_RTSP_LATENCY_MS") or ""
        protocols = tuple(dict.fromkeys(part.strip() for part in names.split(",")))
        is_wait = re.fullmatch("[0-9]{0,5}", latency) and int(latency or 0) <= 60_000
        some, one = ", ".join(_PROTOCOLS), ", ".join(get_args(Library))
        for fits, text in (
            (library in get_args(Library), f"LIBRARY: expected one of {one}, got {library!r}"),
            (
                set(protocols) <= set(_PROTOCOLS),
                f"PROTOCOLS: expected some of {some}, got {names!r}",
            ),
            (is_wait, f"LATENCY_MS: expected milliseconds from 0 to 60000, got {latency!r}"),
        ):
            if not fits:
                raise ConfigError(f"ZSSEG_RTSP_{text}")
        return RtspSettings(
            library=library,  # type: ignore[arg-type]  # checked above
            protocols=protocols,
            latency_ms=int(latency) if latency else None,
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
        yield from self.choose().pictures(reader)

    def choose(self) -> Source:
        library = self.settings.library
        if library == "auto" and self.url.lower().startswith("rtsps:"):
            library = "pyav"  # GStreamer refuses the certificates that cameras sign themselves
        try:
            if library != "pyav":
                return self._through_gstreamer()
        except BackendUnavailableError as exc:
            if library == "gstreamer":
                raise
            tell_once(f"rtsp: read with PyAV, since GStreamer is not complete: {exc}")
        else:
            tell_once("rtsp: read with PyAV")
        return self._through_pyav()

    def _through_gstreamer(self) -> Source:
        from zsseg_rt.stream.gstreamer.library import load, require_elements
        from zsseg_rt.stream.gstreamer.pipelines import RtspCamera, decoder_of, rtsp_elements
        from zsseg_rt.stream.gstreamer.source import GstSource

        library, latency_ms = load(), self.settings.latency_ms
        require_elements(library.Gst, rtsp_elements(library.Gst), "rtsp")
        decoder = decoder_of(library.Gst, "H264")[0]
        tell_once(f"rtsp: read with GStreamer {library.version}, H.264 decoded by {decoder}")
        latency = {} if latency_ms is None else {"latency_ms": latency_ms}
        recipe = RtspCamera(url=self.url, protocols=self.settings.protocols, **latency)
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


@functools.cache
def tell_once(text: str) -> None:
    """Log which library was chosen."""
    _log.info("%s. ZSSEG_RTSP_LIBRARY chooses another.", text)
