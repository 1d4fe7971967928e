"""The view of a labelled frame for clients: a small image, and labels at half its size."""

from __future__ import annotations

import asyncio
import json
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.errors import SourceError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream.writers import frame_of

LONGEST_SIDE = 1280  # pixels of a preview; larger frames are made smaller
_JPEG_QUALITY = 80
_LONGEST_JPEG = 65500  # pixels; what libjpeg takes
_DEFLATE_LEVEL = 1  # labels shrink to 2 % at level 1; higher levels take longer than the JPEG

_Value = TypeVar("_Value")


class Worker:
    """Does jobs in a thread, one after the other."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, job: Callable[[], _Value]) -> _Value:
        async with self._turn:
            return await asyncio.to_thread(job)


@dataclass(frozen=True)
class FrameMessage:
    """A frame as it is sent to viewers, but for the time at which it is sent."""

    header: dict[str, Any]
    content: bytes  # A JPEG, then row-major labels as a zlib stream

    def pack(self, sent_ms: float) -> bytes:
        """The header's length, the header and the content."""
        header = json.dumps({**self.header, "sent_ms": sent_ms}, separators=(",", ":")).encode()
        return struct.pack("<I", len(header)) + header + self.content


class Result:
    """A labelled frame and what was encoded of it; each form is made once, when asked for."""

    def __init__(
        self, number: int, seg: Segmentation, unknown_below: float, order: str, worker: Worker
    ) -> None:
        self.number, self.seg, self.unknown_below = number, seg, unknown_below
        self._order, self._worker = order, worker
        self._at = time.monotonic()
        self._forms: dict[str, asyncio.Future[Any]] = {}

    @property
    def source(self) -> str:
        return frame_of(self.seg).source

    async def message(self) -> FrameMessage:
        return await self._once(
            "message", lambda: encode_message(self.number, self.seg, self._order, self._at)
        )

    async def overlay(self) -> bytes:
        """The frame with its labels' colours on it, a JPEG."""
        return await self._once("overlay", self._encode_overlay)

    def _encode_overlay(self) -> bytes:
        seg, size_hw = self.seg, _preview_size(self.seg.labels.shape)
        image, labels = _resized(frame_of(seg).image, size_hw), _nearest(seg.labels, size_hw)
        return encode_overlay(image, labels, seg.names, self._order)

    async def _once(self, form: str, encode: Callable[[], _Value]) -> _Value:
        if form not in self._forms:
            self._forms[form] = asyncio.ensure_future(self._worker.run(encode))
        encoded: _Value = await asyncio.shield(self._forms[form])
        return encoded


def encode_jpeg(image: npt.NDArray[np.uint8], channel_order: str) -> bytes:
    """A JPEG of an image, uint8 [H, W, 3]."""
    if max(image.shape) > _LONGEST_JPEG:
        height, width = image.shape[:2]
        raise SourceError(
            f"image: expected sides of at most {_LONGEST_JPEG} pixels for a JPEG, got "
            f"{width}x{height}. Ask for image/png."
        )
    bgr = image if channel_order == "bgr" else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))
    assert done  # it only fails for arrays that are no image
    return bytes(data)


def encode_message(
    number: int, seg: Segmentation, channel_order: str, at: float = 0.0
) -> FrameMessage:
    """Encode a frame for viewers; ``at`` is when its result was there."""
    frame, (height, width) = frame_of(seg), _preview_size(seg.labels.shape)
    image = encode_jpeg(_resized(frame.image, (height, width)), channel_order)
    label_hw = (-(-height // 2), -(-width // 2))
    small = _nearest(seg.labels, label_hw)
    small = small.astype(small.dtype.newbyteorder("<"), copy=False)
    labels = zlib.compress(small.tobytes(), _DEFLATE_LEVEL)
    shares = seg.present()
    labelled = sum(entry.pixels for entry in shares)
    header = {
        "type": "frame",
        "id": number,
        "source": frame.source,
        "index": frame.index,
        "width": width,
        "height": height,
        "label_width": label_hw[1],
        "label_height": label_hw[0],
        "label_dtype": seg.labels.dtype.name,
        "vocabulary_version": seg.vocabulary_version,
        "captured_ms": round(frame.captured_at * 1000.0, 3),
        "dropped_before": frame.dropped_before,
        "reused": seg.reused,
        "moved_from": seg.moved_from,
        "labelled_ms": seg.labelled_age and round((at - seg.labelled_age) * 1000.0, 3),
        "image_bytes": len(image),
        "label_bytes": len(labels),
        "shares": [[entry.index, round(entry.share, 6)] for entry in shares],
        "unknown_share": round(1.0 - labelled / seg.labels.size, 6),
    }
    return FrameMessage(header, image + labels)


def encode_overlay(
    image: npt.NDArray[np.uint8],
    labels: npt.NDArray[Any],
    names: tuple[str, ...],
    channel_order: str,
) -> bytes:
    """A JPEG of an image, uint8 [H, W, 3], with its labels' colours on it."""
    colours = palette(names, channel_order)
    return encode_jpeg(ops.overlay(image, labels, colours, alpha=0.5), channel_order)


def _preview_size(size_hw: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, LONGEST_SIDE / max(size_hw))
    height, width = (max(round(side * scale), 1) for side in size_hw)
    return height, width


def _resized(image: npt.NDArray[np.uint8], size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    if image.shape[:2] == size_hw:
        return image
    return np.asarray(cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def _nearest(labels: npt.NDArray[Any], size_hw: tuple[int, int]) -> npt.NDArray[Any]:
    if labels.shape == size_hw:
        return labels
    resized = cv2.resize(labels, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, labels.dtype)
