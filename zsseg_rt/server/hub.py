"""Between the thread that labels and clients: newest frames, their forms, news, and counters."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, get_args

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.common.schema import encode
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.settings import Limits
from zsseg_rt.stream.runner import AGE_BOUNDS, Ages, Stream
from zsseg_rt.stream.watch import SourceState
from zsseg_rt.stream.writers import frame_of

_RATE_OVER = 5.0  # seconds
_STATE_EVERY = 1.0
_LOOK_EVERY = 0.25

LONGEST_SIDE = 1280  # pixels of a preview; larger frames are made smaller
_JPEG_QUALITY = 80
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


class Hub:
    """The state that all clients share. All of it is for the loop's thread but :meth:`publish`."""

    def __init__(self, stream: Stream, labeller: Labeller, limits: Limits) -> None:
        self._sources = tuple(stream.stats())
        self.stream, self.labeller, self.limits = stream, labeller, limits
        self.counts: Counter[str] = Counter()
        self.watchers: Counter[str] = Counter()
        self.state: dict[str, Any] = {}
        self.state_number = 0
        self.vocabulary: dict[str, Any] = labeller.describe(labeller.vocabulary)
        self.is_closed = False
        self._encoder = Worker()
        self._lock = threading.Lock()
        self._newest: dict[str, Result] = {}
        self._number = 0
        self._wakes: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_is_due = False

    def publish(self, seg: Segmentation, unknown_below: float) -> None:
        """Take in a frame that was labelled with this threshold, from any thread."""
        with self._lock:
            self._number += 1
            order = self.labeller.channel_order
            self._newest[frame_of(seg).source] = Result(
                self._number, seg, unknown_below, order, self._encoder
            )
            loop, due = self._loop, self._wake_is_due
            self._wake_is_due = True
        if loop is not None and not due:
            loop.call_soon_threadsafe(self._wake_all)

    def newest(self, source: str | None, sent: dict[str, int]) -> Result | None:
        """The frame that a client gets next, or None if there is none that it has not had."""
        with self._lock:
            fresh = [
                name
                for name, result in self._newest.items()
                if source in (None, name) and result.number > sent.get(name, 0)
            ]
            if not fresh:
                return None
            return self._newest[min(fresh, key=lambda name: sent.get(name, 0))]

    def check_source(self, name: Any) -> str | None:
        if name is None or (isinstance(name, str) and name in self._sources):
            return name
        raise ArgumentError("source: expected the name of a source, or none for all")

    def silences(self) -> dict[str, float | None]:
        """Seconds since each source's last frame was labelled; None before the first."""
        now = time.monotonic()
        last = {name: one.labelled.last for name, one in self.stream.tallies.items()}
        return {name: now - times[-1] if times else None for name, times in last.items()}

    def news(self) -> asyncio.Event:
        """An event that is set whenever there is something new; give it back to :meth:`leave`."""
        event = asyncio.Event()
        self._wakes.add(event)
        return event

    def leave(self, news: asyncio.Event) -> None:
        self._wakes.discard(news)

    def tell_vocabulary(self) -> None:
        """Let viewers know that classes or settings have changed."""
        self.vocabulary = self.labeller.describe(self.labeller.vocabulary)
        self._wake_all()

    def close(self) -> None:
        self.is_closed = True
        with self._lock:
            self._loop = None  # it ends before the frame that is being labelled may
        self._wake_all()

    async def run(self) -> None:
        """Tell viewers every second, and when a source's state changes, how sources do."""
        self._loop = asyncio.get_running_loop()
        told_at = float("-inf")
        last_states: Sequence[str] = ()
        while True:
            stats = self.stream.stats()
            states = tuple(one.state for one in stats.values())
            if states != last_states or time.monotonic() - told_at >= _STATE_EVERY:
                told_at, last_states = time.monotonic(), states
                self.state = self._describe(stats)
                self.state_number += 1
                self._wake_all()
            await asyncio.sleep(_LOOK_EVERY)

    def _describe(self, stats: dict[str, Any]) -> dict[str, Any]:
        tallies = self.stream.tallies.values()
        return {
            "type": "state",
            "sources": [{"name": name, **encode(one)} for name, one in stats.items()],
            "rate": round(sum(one.labelled.of_late(_RATE_OVER) for one in tallies), 2),
            "given_out_rate": round(sum(one.given_out.of_late(_RATE_OVER) for one in tallies), 2),
            "viewers": self.watchers["viewers"],
        }

    def _wake_all(self) -> None:
        with self._lock:
            self._wake_is_due = False
        for event in self._wakes:
            event.set()


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[str, dict[str, str], Any]  # suffix of the name, labels, value

# Counters; those of sources are fields of their statistics, behind the first word.
_OF_SOURCES = {
    "frames_captured": "Frames that the source has given.",
    "frames_labelled": "Frames that were labelled.",
    "frames_given_out": "Frames given out with labels, moved or not.",
    "frames_dropped": "Frames that were dropped before labelling.",
    "frames_damaged": "Packets and frames that could not be decoded.",
    "source_reconnects": "Times that a lost source came back.",
    "source_fell_behind": "Times that a source was reopened because it was late.",
}
_OF_SERVER = {
    "frames_sent": "Frames that were sent to viewers.",
    "bytes_sent": "Bytes of frames that were sent to viewers.",
    "viewers_dropped": "Viewers that did not acknowledge in time.",
    "connections_refused": "Connections beyond the limit.",
    "connections_dropped": "Connections that were silent or took no bytes.",
    "pictures": "Pictures of clients that were labelled.",
}


def write_metrics(hub: Hub) -> str:
    """All metrics of a server."""
    stats, tallies, watchers = hub.stream.stats(), hub.stream.tallies, hub.watchers
    families: list[tuple[str, str, str, list[_Sample]]] = []
    for key, text in _OF_SOURCES.items():
        field = key.partition("_")[2]
        counts = [("", {"source": name}, getattr(one, field)) for name, one in stats.items()]
        families.append((f"{key}_total", "counter", text, counts))
    states: list[_Sample] = [
        ("", {"source": name, "state": state}, float(one.state == state))
        for name, one in stats.items()
        for state in get_args(SourceState)
    ]
    silences = [
        ("", {"source": n}, math.inf if s is None else s) for n, s in hub.silences().items()
    ]
    families += [
        (f"{key}_total", "counter", text, [("", {}, hub.counts[key])])
        for key, text in _OF_SERVER.items()
    ]
    families += [
        ("source_state", "gauge", "1 for the state that the source is in.", states),
        ("frame_age_seconds", "histogram", "Seconds from capture to labels.",
         _buckets({name: one.ages for name, one in tallies.items()})),
        ("labelled_age_seconds", "histogram",
         "Seconds from the capture of the frame that was labelled to the result.",
         _buckets({name: one.labelled_ages for name, one in tallies.items()})),
        ("seconds_since_frame", "gauge",
         "Since the last frame of the source was labelled; infinite before the first.", silences),
        ("viewers", "gauge", "Viewers.", [("", {}, watchers["viewers"])]),
        ("motion_jpeg_clients", "gauge", "Clients of /stream.mjpg.",
         [("", {}, watchers["motion_jpegs"])]),
        ("vocabulary_version", "gauge", "Version of the classes.",
         [("", {}, hub.labeller.vocabulary.version)]),
    ]  # fmt: skip
    return "".join(_family(*family) for family in families)


def _buckets(ages: Mapping[str, Ages]) -> list[_Sample]:
    samples: list[_Sample] = []
    for source, one in ages.items():
        labels, counts = {"source": source}, list(one.counts)  # of one moment
        bounds = zip([*map(str, AGE_BOUNDS), "+Inf"], accumulate(counts), strict=True)
        samples += [("_bucket", {**labels, "le": bound}, count) for bound, count in bounds]
        samples.append(("_sum", labels, one.total))
        samples.append(("_count", labels, sum(counts)))
    return samples


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> str:
    lines = [f"# HELP zsseg_{name} {text}", f"# TYPE zsseg_{name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{text.translate(_ESCAPED)}"' for key, text in labels.items())
        where = f"{{{inside}}}" if inside else ""
        lines.append(f"zsseg_{name}{suffix}{where} {'+Inf' if value == math.inf else value}")
    return "\n".join(lines) + "\n"


_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
