"""Between the thread that labels and clients: newest frames, news, and counters of Prometheus."""

from __future__ import annotations

import asyncio
import bisect
import copy
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, get_args

from zsseg_rt.common.schema import encode
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.preview import ALPHA, Result
from zsseg_rt.server.settings import Limits
from zsseg_rt.server.worker import Worker
from zsseg_rt.stream.painting import GpuPainter
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.watch import SourceState
from zsseg_rt.stream.writers import frame_of

_RATE_OVER = 5.0  # seconds
_STATE_EVERY = 1.0
_LOOK_EVERY = 0.25


class Hub:
    """What all clients share. All of it is for the loop's thread but :meth:`publish`."""

    def __init__(self, stream: Stream, labeller: Labeller, limits: Limits) -> None:
        self._sources = tuple(stream.stats())
        self.stream, self.labeller, self.limits = stream, labeller, limits
        self.counts: Counter[str] = Counter()
        self.watchers: Counter[str] = Counter()
        self.state: dict[str, Any] = {}
        self.state_number = 0
        self.vocabulary: dict[str, Any] = labeller.describe(labeller.vocabulary)
        self.is_closed = False
        self._encoder = Worker("encode")
        self._painter = GpuPainter(labeller.channel_order, ALPHA)
        self._lock = threading.Lock()
        self._newest: dict[str, Result] = {}
        self._ages: defaultdict[str, AgeHistogram] = defaultdict(AgeHistogram)
        self._labelled_ages: defaultdict[str, AgeHistogram] = defaultdict(AgeHistogram)
        self._number = 0
        self._given_out: deque[tuple[float, bool]] = deque()  # when, and whether labelled itself
        self._labelled: dict[str, int] = {}  # the newest frame that was, per source
        self._last_at: dict[str, float] = {}  # per source
        self._began_at = 0.0
        self._wakes: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_is_due = False

    def publish(self, seg: Segmentation, *, is_new: bool = True) -> None:
        """Take in a labelled frame, from any thread; one that is labelled anew does not count."""
        with self._lock:
            self._number += 1
            order = self.labeller.channel_order
            result = Result(self._number, seg, order, self._encoder, self._painter)
            self._newest[frame_of(seg).source] = result
            if is_new:
                self._note(seg)
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
        """The name of a source, or None for all."""
        if name is None or (isinstance(name, str) and name in self._sources):
            return name
        raise ArgumentError("source: expected the name of a source, or none for all")

    def rates(self) -> tuple[float, float]:
        """Frames that were labelled, and that were given out, per second over the last five."""
        with self._lock:
            now = time.monotonic()
            over = min(_RATE_OVER, max(now - self._began_at, 1.0))
            news = [is_labelled for at, is_labelled in self._given_out if at >= now - over]
            return sum(news) / over, len(news) / over

    def ages(self) -> tuple[dict[str, AgeHistogram], dict[str, AgeHistogram]]:
        """How old each source's frames were when their labels came, and those once labelled."""
        with self._lock:
            return copy.deepcopy((dict(self._ages), dict(self._labelled_ages)))

    def silences(self) -> dict[str, float | None]:
        """Seconds since each source's last frame was labelled; None before the first."""
        with self._lock:
            now, last = time.monotonic(), self._last_at
            return {name: now - last[name] if name in last else None for name in self._sources}

    def news(self) -> asyncio.Event:
        """An event that is set whenever there is something new; give it back to :meth:`leave`."""
        event = asyncio.Event()
        self._wakes.add(event)
        return event

    def leave(self, news: asyncio.Event) -> None:
        """Set that event no more."""
        self._wakes.discard(news)

    def tell_vocabulary(self) -> None:
        """Let viewers know that classes or settings have changed."""
        self.vocabulary = self.labeller.describe(self.labeller.vocabulary)
        self._wake_all()

    def close(self) -> None:
        """Let all viewers go."""
        self.is_closed = True
        with self._lock:
            self._loop = None  # it ends before the frame that is being labelled may
        self._wake_all()

    async def run(self) -> None:
        """Tell viewers every second, and when a source's state changes, how sources do."""
        self._loop = asyncio.get_running_loop()
        told_at = float("-inf")
        told: Sequence[str] = ()
        while True:
            stats = self.stream.stats()
            states = tuple(one.state for one in stats.values())
            if states != told or time.monotonic() - told_at >= _STATE_EVERY:
                told_at, told = time.monotonic(), states
                self.state = self._describe(stats)
                self.state_number += 1
                self._wake_all()
            await asyncio.sleep(_LOOK_EVERY)

    def _note(self, seg: Segmentation) -> None:
        frame, now = frame_of(seg), time.monotonic()
        self._began_at = self._began_at or now
        self._ages[frame.source].add(now - frame.captured_at)
        self._labelled_ages[frame.source].add(seg.labelled_age or 0.0)
        labelled = frame.index if seg.moved_from is None else seg.moved_from
        is_labelled = self._labelled.get(frame.source) != labelled  # else its labels were moved
        self._given_out.append((now, is_labelled))
        if is_labelled:
            self._labelled[frame.source], self._last_at[frame.source] = labelled, now
        while self._given_out[0][0] < now - _RATE_OVER:
            self._given_out.popleft()

    def _describe(self, stats: dict[str, Any]) -> dict[str, Any]:
        labelled, given_out = self.rates()
        return {
            "type": "state",
            "sources": [{"name": name, **encode(one)} for name, one in stats.items()],
            "rate": round(labelled, 2),
            "given_out_rate": round(given_out, 2),
            "viewers": self.watchers["viewers"],
        }

    def _wake_all(self) -> None:
        with self._lock:
            self._wake_is_due = False
        for event in self._wakes:
            event.set()


_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


@dataclass
class AgeHistogram:
    """Ages of one source's frames, counted by how long they are."""

    total: float = 0.0  # Sum of all ages in seconds
    # Frames per bucket; the last holds what is older than every bound
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        """Count a frame."""
        self.total += seconds
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[str, Mapping[str, str], float]  # suffix of the name, labels, value

_OF_SOURCES = {
    "captured": ("zsseg_frames_captured_total", "Frames that the source has given."),
    "labelled": ("zsseg_frames_labelled_total", "Frames that were labelled."),
    "given_out": ("zsseg_frames_given_out_total", "Frames given out with labels, moved or not."),
    "dropped": ("zsseg_frames_dropped_total", "Frames that were dropped before labelling."),
    "damaged": ("zsseg_frames_damaged_total", "Packets and frames that could not be decoded."),
    "reconnects": ("zsseg_source_reconnects_total", "Times that a lost source came back."),
    "fell_behind": (
        "zsseg_source_fell_behind_total", "Times that a source was reopened because it was late.",
    ),
}  # fmt: skip
_OF_SERVER = {
    "frames_sent": ("zsseg_frames_sent_total", "Frames that were sent to viewers."),
    "bytes_sent": ("zsseg_bytes_sent_total", "Bytes of frames that were sent to viewers."),
    "viewers_dropped": ("zsseg_viewers_dropped_total", "Viewers that did not acknowledge in time."),
    "connections_refused": (
        "zsseg_connections_refused_total", "Connections beyond the limit.",
    ),
    "connections_dropped": (
        "zsseg_connections_dropped_total", "Connections that were silent or took no bytes.",
    ),
    "pictures": ("zsseg_pictures_total", "Pictures of clients that were labelled."),
}  # fmt: skip


def write_metrics(hub: Hub) -> str:
    """All metrics of a server."""
    stats, (ages, labelled_ages) = hub.stream.stats(), hub.ages()
    families: list[tuple[str, str, str, list[_Sample]]] = [
        (name, "counter", text,
         [("", {"source": key}, getattr(one, attribute)) for key, one in stats.items()])
        for attribute, (name, text) in _OF_SOURCES.items()
    ]  # fmt: skip
    states: list[_Sample] = [
        ("", {"source": key, "state": state}, float(one.state == state))
        for key, one in stats.items()
        for state in get_args(SourceState)
    ]
    silences: list[_Sample] = [
        ("", {"source": name}, math.inf if since is None else since)
        for name, since in hub.silences().items()
    ]
    families += [
        ("zsseg_source_state", "gauge", "1 for the state that the source is in.", states),
        ("zsseg_frame_age_seconds", "histogram", "Seconds from capture to labels.", _buckets(ages)),
        ("zsseg_labelled_age_seconds", "histogram",
         "Seconds from the capture of the frame that was labelled to the result.",
         _buckets(labelled_ages)),
        ("zsseg_seconds_since_frame", "gauge",
         "Since the last frame of the source was labelled; infinite before the first.", silences),
    ]  # fmt: skip
    watchers, version = hub.watchers, hub.labeller.vocabulary.version
    single = [
        *((name, "counter", text, hub.counts[key]) for key, (name, text) in _OF_SERVER.items()),
        ("zsseg_viewers", "gauge", "Viewers.", watchers["viewers"]),
        ("zsseg_motion_jpeg_clients", "gauge", "Clients of /stream.mjpg.",
         watchers["motion_jpegs"]),
        ("zsseg_vocabulary_version", "gauge", "Version of the classes.", version),
    ]  # fmt: skip
    families += [(name, kind, text, [("", {}, value)]) for name, kind, text, value in single]
    return "".join(_family(*family) for family in families)


def _buckets(ages: Mapping[str, AgeHistogram]) -> list[_Sample]:
    samples: list[_Sample] = []
    for source, histogram in ages.items():
        labels = {"source": source}
        bounds = zip([*map(str, _BOUNDS), "+Inf"], accumulate(histogram.counts), strict=True)
        samples += [("_bucket", {**labels, "le": bound}, count) for bound, count in bounds]
        samples.append(("_sum", labels, histogram.total))
        samples.append(("_count", labels, sum(histogram.counts)))
    return samples


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        where = f"{name}{suffix}{{{inside}}}" if inside else f"{name}{suffix}"
        lines.append(f"{where} {'+Inf' if value == math.inf else value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
