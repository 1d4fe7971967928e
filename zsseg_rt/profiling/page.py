"""A report as files: an HTML page that needs nothing from outside, and a Chrome trace.

Bars are drawn by the page's style. Perfetto and Chrome show the trace: the median and the slowest
frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from zsseg_rt.profiling.report import Report, VariantReport
from zsseg_rt.profiling.tables import ABSENT, TextTable, difference_words, report_tables, versions

_FIGURE = re.compile(rf"[-+{ABSENT}0-9.,% to]*( (ms|s|MB|MHz|°C))?")
_BAR = ' class="bar"'
_GRAPH_STAGES = {"region_encoder": "regions"}  # graphs whose stage has another name


def render_html(report: Report) -> str:
    """The whole page."""
    title = f"Profile of {report.variants[0].name}" if report.variants else "Profile"
    page = files("zsseg_rt.profiling").joinpath("page.html").read_text(encoding="utf-8")
    return Template(page).substitute(title=escape(title), body="\n".join(_body(report, title)))


def _body(report: Report, title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="dim">{escape(versions(report))}; frames from {escape(report.source)}; '
        f"{report.rounds} rounds in {report.seconds:.1f} s</p>"
    )
    yield from _verdicts(report)
    for table in report_tables(report):
        if not table.title.startswith("against "):
            yield from _table(table)
    rows = tuple((key, value) for key, value in report.machine.items())
    yield from _table(TextTable(title="machine", headings=("", "value"), rows=rows))
    yield f"<h2>Repeat</h2>\n<code>{escape(report.command)}</code>"
    yield f'<p class="dim">Changes up to {report.threshold:.1%} count as equal. ' \
          "docs/profiling.md explains columns and verdicts.</p>"  # fmt: skip


def _verdicts(report: Report) -> Iterator[str]:
    lines: list[tuple[str, str]] = [
        *((one.difference.verdict, f"{one.other}: {difference_words(one.difference)}")
          for one in report.comparisons),
        *(("failed", f"failed: {one.failure}") for one in report.variants if one.failure),
        *(("note", note) for note in report.notes),
    ]  # fmt: skip
    if lines:
        items = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in lines)
        yield f'<ul class="verdicts">{items}</ul>'


def _table(table: TextTable) -> Iterator[str]:
    columns = range(len(table.headings))
    kinds = [_column(table, index) for index in columns]
    heads = "".join(
        f"<th{kind}>{escape(text)}</th>" for text, kind in zip(table.headings, kinds, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row, kinds))}</tr>" for row in table.rows)
    yield f"<h2>{escape(table.title[:1].upper() + table.title[1:])}</h2>"
    yield (
        f'<div class="box" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _column(table: TextTable, index: int) -> str:
    """The class of a column's cells: shares of a whole are bars, other figures stand right."""
    if table.headings[index].startswith("of the "):
        return _BAR
    numeric = all(_FIGURE.fullmatch(row[index]) for row in table.rows)
    return ' class="n"' if numeric and index > 0 else ""


def _cell(text: str, kind: str) -> str:
    if kind == _BAR and text != ABSENT:
        kind += f' style="--share: {float(text.rstrip("%")) / 100:.3f}"'
    elif len(text) > 60:
        kind = ' class="wide"'
    return f"<td{kind}>{escape(text)}</td>"


def make_trace(report: Report) -> dict[str, Any]:
    """A trace with a process for each variant and a thread for each of its two frames.

    Nodes are means of runs of their own. They are stretched or shrunk to their stage, and keep
    their milliseconds as ``mean_ms``.
    """
    events = [
        {**event, "pid": number}
        for number, variant in enumerate(report.variants, start=1)
        if variant.samples.wall_ms
        for event in _events_of(variant)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": report.machine}


def _events_of(variant: VariantReport) -> Iterator[dict[str, Any]]:
    """Events without their process."""
    yield {"name": "process_name", "ph": "M", "tid": 0, "args": {"name": variant.name}}
    walls = variant.samples.wall_ms
    median, slowest = int(np.argsort(walls)[(len(walls) - 1) // 2]), int(np.argmax(walls))
    frames = {"median frame": median, "slowest frame": slowest}
    for thread, (title, index) in enumerate(frames.items(), start=1):
        yield {"name": "thread_name", "ph": "M", "tid": thread, "args": {"name": title}}
        for name, begin_ms, ms, more in _spans(variant, index):
            span = {"name": name, "ph": "X", "ts": begin_ms * 1e3, "dur": ms * 1e3, "tid": thread}
            yield {**span, **more}
    for seconds, watts in () if variant.energy is None else variant.energy.samples:
        yield {"name": "energy", "ph": "C", "ts": seconds * 1e6, "args": {"W": watts}}


def _spans(
    variant: VariantReport, index: int
) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Name, begin and duration in ms of a frame, of its stages and of their nodes."""
    yield "frame", 0.0, variant.samples.wall_ms[index], {}
    begin = 0.0
    for stage, times in variant.samples.stages.items():
        yield stage, begin, times[index], {}
        nodes = [n for n in variant.nodes if _GRAPH_STAGES.get(n.graph, n.graph) == stage]
        total, at = sum(node.ms for node in nodes), begin
        for node in (node for node in nodes if node.ms > 0.0):
            ms = times[index] * node.ms / total
            parts = {"type": node.type, "block": node.block, "kind": node.kind}
            yield node.name or node.type, at, ms, {"args": {"mean_ms": node.ms, **parts}}
            at += ms
        begin += times[index]
