"""The median and the slowest frame as a Chrome trace, which Perfetto and Chrome show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zsseg_rt.profiling.report import NodeRow, Report, VariantReport

_FRAMES = ("median frame", "slowest frame")
_GRAPH_STAGES = {"region_encoder": "regions"}  # graphs whose stage has another name
_POWER = "energy"

Event = dict[str, Any]


def make_trace(report: Report) -> dict[str, Any]:
    """A trace with a process for each variant and a thread for each of its two frames.

    Nodes are means of runs of their own. They are stretched or shrunk to their stage, and keep
    their milliseconds as ``mean_ms``.
    """
    events: list[Event] = []
    for number, variant in enumerate(report.variants, start=1):
        if variant.samples.wall_ms:
            events += _events_of(variant, number)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": report.machine}


def _events_of(variant: VariantReport, process: int) -> Iterator[Event]:
    yield _name("process_name", variant.name, process, 0)
    walls = variant.samples.wall_ms
    slowest = int(np.argmax(walls))
    median = int(np.argsort(walls)[(len(walls) - 1) // 2])
    for thread, (title, index) in enumerate(zip(_FRAMES, (median, slowest), strict=True), start=1):
        yield _name("thread_name", title, process, thread)
        yield _span("frame", 0.0, walls[index], process, thread)
        yield from _stages(variant, index, process, thread)
    if variant.energy is not None:
        for seconds, watts in variant.energy.samples:
            yield {"name": _POWER, "ph": "C", "ts": seconds * 1e6, "pid": process,
                   "args": {"W": watts}}  # fmt: skip


def _stages(variant: VariantReport, index: int, process: int, thread: int) -> Iterator[Event]:
    begin = 0.0
    for stage, times in variant.samples.stages.items():
        yield _span(stage, begin, times[index], process, thread)
        nodes = [n for n in variant.nodes if _GRAPH_STAGES.get(n.graph, n.graph) == stage]
        yield from _nodes(nodes, begin, times[index], process, thread)
        begin += times[index]


def _nodes(
    nodes: Sequence[NodeRow], begin: float, duration: float, process: int, thread: int
) -> Iterator[Event]:
    total = sum(node.ms for node in nodes)
    for node in nodes:
        if node.ms <= 0.0:
            continue
        share = duration * node.ms / total
        told = {"mean_ms": node.ms, "type": node.type, "block": node.block, "kind": node.kind}
        yield _span(node.name or node.type, begin, share, process, thread) | {"args": told}
        begin += share


def _span(name: str, begin_ms: float, ms: float, process: int, thread: int) -> Event:
    return {"name": name, "ph": "X", "ts": begin_ms * 1e3, "dur": ms * 1e3, "pid": process,
            "tid": thread}  # fmt: skip


def _name(kind: str, name: str, process: int, thread: int) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
