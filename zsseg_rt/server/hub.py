"""Between the thread that labels and clients: newest frames, news, and counters of Prometheus."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, get_args

from zsseg_rt.common.schema import encode
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.preview import Result, Worker
from zsseg_rt.server.settings import Limits
from zsseg_rt.stream.runner import AGE_BOUNDS, Ages, Stream
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
