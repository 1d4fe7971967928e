"""Overlays as a network camera: ``rtsp://@:8554/seg``."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.gstreamer.address import Address
from zsseg_rt.stream.gstreamer.encoders import encoding_for
from zsseg_rt.stream.gstreamer.library import load
from zsseg_rt.stream.gstreamer.rtsp_server import Channel, RtspServer
from zsseg_rt.stream.i420 import encodable
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.writers import Tags, frame_of

_log = logging.getLogger(__name__)


class RtspSink:
    """Serves each frame with its labels' colours laid over it, as H.264 over RTSP.

    Nothing is painted or encoded unless somebody watches. A source with a tag has a path of its
    own, ``/seg-TAG``; each path is there from the source's first frame on. Sides are made even by
    repeating the last row or column.

    Shapes:
        text: The address, ``rtsp://[USER:PASSWORD]@[HOST]:PORT/PATH``.
    """

    def __init__(self, text: str, *, channel_order: str, painter: Painter, tags: Tags) -> None:
        self._address = Address.parse(text)
        self.files: list[str] = []
        self.whose: dict[str, str] = {}
        self.folder: Path | None = None
        self._order, self._tags = channel_order, tags
        name = self._address.shown()
        encoding_for(load().Gst, (16, 16), name)  # refuses where there is none
        self._server = RtspServer(name, self._address)
        self.port = self._server.port
        self.name = self._address.shown(self.port)
        self._painter = painter
        self._size_hw: tuple[int, ...] = ()
        self._channels: dict[str, Channel] = {}
        self._canvas = np.empty((0, 0, 3), np.uint8)
        if self._address.is_open:
            _log.warning(
                "%s: anyone who can reach this port can watch. rtsp://@127.0.0.1:PORT/NAME is for "
                "this machine alone, rtsp://USER:PASSWORD@:PORT/NAME asks for a password.",
                self.name,
            )

    @property
    def painted(self) -> str | None:
        """Where overlays are painted."""
        return self._painter.painted

    def write(self, seg: Segmentation) -> None:
        """Send one frame to those who watch."""
        frame = frame_of(seg)
        if self._size_hw != seg.labels.shape:
            self._canvas, self._size_hw = self._painter.canvas(seg), seg.labels.shape
        height, width = encodable(self._canvas).shape[:2]
        padding = ((0, height % 2), (0, width % 2), (0, 0))
        channel = self._channels.get(frame.source)
        if channel is None:
            channel = self._add(frame, (height + height % 2, width + width % 2))
        if channel.is_watched:
            self._painter.paint(seg, self._canvas)
            channel.send(np.pad(encodable(self._canvas), padding, mode="edge"))

    def close(self) -> None:
        """Part with the viewers, free the port."""
        self._server.close()

    def remove_old(self) -> None:
        """Nothing is kept."""

    def _add(self, frame: Frame, size_hw: tuple[int, int]) -> Channel:
        path = self._tags.join(self._address.path, frame.source)
        self.whose[self._tags.join(self.name, frame.source)] = frame.source
        channel = self._server.add(path, size_hw, self._order)
        self._channels[frame.source] = channel
        return channel
