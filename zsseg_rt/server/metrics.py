"""Counters in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import get_args

from zsseg_rt.server.hub import AgeHistogram, Hub
from zsseg_rt.stream.runner import SourceStats
from zsseg_rt.stream.watch import SourceState

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
    stats = hub.stream.stats()
    ages, labelled_ages = hub.ages()
    families = [
        *_of_sources(stats),
        _of_ages("zsseg_frame_age_seconds", "Seconds from capture to labels.", ages),
        _of_ages(
            "zsseg_labelled_age_seconds",
            "Seconds from the capture of the frame that was labelled to the result.",
            labelled_ages,
        ),
        *_of_server(hub),
    ]
    return "".join(families)


def _of_sources(stats: Mapping[str, SourceStats]) -> Iterable[str]:
    for field, (name, text) in _OF_SOURCES.items():
        samples = [("", {"source": key}, getattr(one, field)) for key, one in stats.items()]
        yield _family(name, "counter", text, samples)
    states = [
        ("", {"source": key, "state": state}, float(one.state == state))
        for key, one in stats.items()
        for state in get_args(SourceState)
    ]
    yield _family("zsseg_source_state", "gauge", "1 for the state that the source is in.", states)


def _of_ages(name: str, text: str, ages: Mapping[str, AgeHistogram]) -> str:
    samples: list[_Sample] = []
    for source, histogram in ages.items():
        labels = {"source": source}
        for bound, count in histogram.cumulative():
            samples.append(("_bucket", {**labels, "le": bound}, count))
        samples.append(("_sum", labels, histogram.total))
        samples.append(("_count", labels, histogram.count))
    return _family(name, "histogram", text, samples)


def _of_server(hub: Hub) -> Iterable[str]:
    for key, (name, text) in _OF_SERVER.items():
        yield _single(name, "counter", text, hub.counts[key])
    yield _single("zsseg_viewers", "gauge", "Viewers.", hub.watchers["viewers"])
    yield _single(
        "zsseg_motion_jpeg_clients", "gauge", "Clients of /stream.mjpg.",
        hub.watchers["motion_jpegs"],
    )  # fmt: skip
    version = hub.labeller.vocabulary.version
    yield _single("zsseg_vocabulary_version", "gauge", "Version of the classes.", version)
    yield _family(
        "zsseg_seconds_since_frame", "gauge",
        "Since the last frame of the source was labelled; infinite before the first.",
        [("", {"source": name}, math.inf if since is None else since)
         for name, since in hub.silences().items()],
    )  # fmt: skip


def _single(name: str, kind: str, text: str, value: float) -> str:
    return _family(name, kind, text, [("", {}, value)])


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        where = f"{name}{suffix}{{{inside}}}" if inside else f"{name}{suffix}"
        lines.append(f"{where} {'+Inf' if value == math.inf else value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
