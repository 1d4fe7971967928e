"""A report as tables of text, as an HTML page and as a Chrome trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from zsseg_rt.profiling.conditions import Reading
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.report import OUTSIDE, Report, VariantReport, sum_by

ABSENT = "\N{EN DASH}"
BASIS_WORDS = {"wall": "wall time", "cpu": "CPU time", "device": "GPU time"}
_FIGURE = re.compile(rf"[-+{ABSENT}0-9.,% to]*( (ms|s|MB|MHz|°C))?")
_GRAPH_STAGES = {"region_encoder": "regions"}  # graphs whose stage has another name
_PERCENTILES = ("p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True)
class TextTable:
    """Rows of text under headings; all columns but the first are numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(title: str, items: Iterable[Any], columns: Mapping[str, str]) -> TextTable:
    """A row per item; columns are paths into it, with ``:4`` (decimals) or ``:%`` (a share)."""
    rows = tuple(tuple(_cell(item, path) for path in columns.values()) for item in items)
    return TextTable(title, tuple(columns), rows)


def _cell(value: Any, path: str) -> str:
    path, _, form = path.partition(":")
    for name in path.split("."):
        if value is not None:
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    if value is None:
        return ABSENT
    if form == "%":
        return f"{value:.1%}"
    if isinstance(value, tuple):
        return " to ".join(map(number, value))
    return number(value, int(form or 2)) if isinstance(value, float) else str(value)


def number(value: float, digits: int = 2) -> str:
    """A figure with that many decimals below ten, one or none above."""
    return f"{value:.{digits if abs(value) < 10 else int(abs(value) < 100)}f}"


def report_tables(report: Report) -> list[TextTable]:
    """Every table of a report that has rows, in the order in which they are read."""
    variants = report.variants
    several = len(variants) > 1 or any(one.miou is not None for one in variants)
    base = variants[0].name if variants else ""
    compared = [(one.other, difference_words(one.difference)) for one in report.comparisons]
    starts = [
        {"variant": one.name, "cache": "with" if start.cached else "without", "of": start}
        for one in variants
        for start in one.cold_starts
    ]
    against = TextTable(f"against {base}", ("variant", "verdict"), tuple(compared))
    tables = [
        table("what ran", variants, _WHAT_RAN),
        table("frames", variants, _FRAMES),
        table("more about them", variants, _PROCESSORS),
        table("which to ship", variants if several else (), _SHIP),
        against,
        table("latency in ms of frames that fall due by a clock",
              (one for one in variants if one.paced is not None), _PACED),
        *map(_stages, variants),
        *map(_nodes, variants),
        table("energy", (one for one in variants if one.energy is not None), _ENERGY),
        table("a fresh process", starts, _STARTS),
        table("conditions", map(_reading, report.conditions.readings), _CONDITIONS),
    ]  # fmt: skip
    return [shown for shown in tables if shown.rows]


def versions(report: Report) -> str:
    """Processor and versions, as they stand in a report's first line."""
    machine = report.machine
    shown = [f"zsseg_rt {report.version}", f"Python {machine.get('python', ABSENT)}"]
    libraries = (one.described.get("library", "") for one in report.variants)
    shown += [library for library in dict.fromkeys(libraries) if library]
    processor = f"{machine.get('cpu', ABSENT)}, {machine.get('usable_cpus', ABSENT)} CPUs"
    return f"{processor}; {', '.join(shown)}"


def difference_words(difference: Difference) -> str:
    """A verdict as a sentence."""
    d, interval = difference, "no interval yet"
    if d.low is not None and d.high is not None:
        interval = f"{d.low:+.1%} to {d.high:+.1%}"
    text = f"{d.verdict}: {d.change:+.1%} ({interval}) by {BASIS_WORDS[d.basis]}"
    if d.verdict != "undecided":
        return f"{text}, {d.rounds} rounds"
    if d.rounds_needed is None:
        return f"{text}; too near {d.threshold:.1%} to be decided by more rounds"
    return f"{text}; about {d.rounds_needed} rounds would decide, not {d.rounds} (--max-duration)"


def _percentiles(path: str = "", unit: str = "") -> dict[str, str]:
    return {f"{name}{unit}": f"{path}{name}" for name in _PERCENTILES}


# Everything that a figure must be quoted with, as trtexec's heading has it.
_WHAT_RAN = {
    "variant": "name",
    **{key: f"described.{key}" for key in ("device", "backend", "precision", "threads", "input")},
    "frames": "frame",
    "classes": "classes",
}
_FRAMES = {
    "variant": "name",
    "frames": "wall.count",
    **_percentiles("wall.", " ms"),
    "frames/s": "frames_per_second",
}
_PROCESSORS = {
    "variant": "name",
    "p50 95 %": "wall.p50_ends",
    "CPU ms": "cpu.mean",
    "waiting": "waiting:%",
    "GPU ms": "device.p50",
    "cold p50": "cold.p50",
    "cold max": "cold.max",
}
_SHIP = {  # where there are several variants, or labels were judged
    "variant": "name",
    "size MB": "size_mb",
    "load s": "load_s",
    "peak MB": "peak_mb",
    "p50 ms": "wall.p50",
    "p95 ms": "wall.p95",
    "frames/s": "frames_per_second",
    "mJ": "energy.mj",
    "as float32": "agreement:%",
    "mIoU %": "miou",
}
_PACED = {
    "variant": "name",
    "frames/s": "paced.rate",
    "frames": "paced.frames",
    "late": "paced.late",
    **_percentiles("paced.latency."),
    "service p50": "paced.service.p50",
    "service p99": "paced.service.p99",
}
_ENERGY = {
    "variant": "name",
    "mJ a frame": "energy.mj",
    "above idle": "energy.mj_above_idle",
    "W": "energy.watts",
    "idle W": "energy.idle_watts",
    "frames": "energy.frames",
    "source": "energy.source",
}
_STARTS = {
    "variant": "variant",
    "cache": "cache",
    "import s": "of.import_s:4",
    "load s": "of.load_s",
    "classes s": "of.classes_s:4",
    "first frame s": "of.first_frame_s:4",
    "peak MB": "of.peak_mb",
}
_CONDITIONS = {"": "name", "value": "value", "note": "note"}


def _stages(variant: VariantReport) -> TextTable:
    total = sum(times.mean for times in variant.stages.values())
    rows = [
        {"stage": stage, "times": times, "share": times.mean / total if total else None}
        for stage, times in variant.stages.items()
    ]
    columns = {
        "stage": "stage",
        **_percentiles("times.", " ms"),
        "mean ms": "times.mean",
        "of the frame": "share:%",
    }
    return table(f"stages of {variant.name}", rows, columns)


def _nodes(variant: VariantReport) -> TextTable:
    """Milliseconds by kind, the longest of a graph first."""
    totals = sum_by(variant.nodes, lambda node: (node.graph, node.kind))
    graphs = sum_by(variant.nodes, lambda node: node.graph)
    places = list(graphs)
    order = sorted(totals, key=lambda one: (places.index(one[0]), one[1] == OUTSIDE, -totals[one]))
    rows = [
        {"graph": graph, "kind": kind, "ms": totals[graph, kind],
         "share": totals[graph, kind] / graphs[graph]}
        for graph, kind in order
    ]  # fmt: skip
    columns = {"graph": "graph", "kind": "kind", "ms": "ms:3", "of the graph": "share:%"}
    return table(f"nodes of {variant.name} by kind", rows, columns)


def _reading(reading: Reading) -> dict[str, Any]:
    value, note = reading.value, ""
    if value is None:
        note = f"{reading.reason}; see: {reading.command}"
    elif reading.before is not None:
        note = f"{number(reading.before, 1)} before"
    if isinstance(value, float):
        value = f"{number(value)} {reading.unit}" if reading.unit else f"{value:.1%}"
    return {"name": reading.name, "value": value, "note": note}


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
    lines: list[tuple[str, str]] = [
        (one.difference.verdict, f"{one.other}: {difference_words(one.difference)}")
        for one in report.comparisons
    ]
    lines += [("failed", f"failed: {one.failure}") for one in report.variants if one.failure]
    lines += [("note", note) for note in report.notes]
    if lines:
        items = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in lines)
        yield f'<ul class="verdicts">{items}</ul>'
    for shown in report_tables(report):
        if not shown.title.startswith("against "):
            yield _html_table(shown)
    yield _html_table(TextTable("machine", ("", "value"), tuple(report.machine.items())))
    yield f"<h2>Repeat</h2>\n<code>{escape(report.command)}</code>"
    yield f'<p class="dim">Changes up to {report.threshold:.1%} count as equal. ' \
          "docs/profiling.md explains columns and verdicts.</p>"  # fmt: skip


def _html_table(shown: TextTable) -> str:
    """Shares of a whole are bars, other figures stand right."""
    columns = []
    for index, heading in enumerate(shown.headings):
        cells = [row[index] for row in shown.rows]
        numeric = index > 0 and all(map(_FIGURE.fullmatch, cells))
        kind = ' class="n"' if numeric and not heading.startswith("of the ") else ""
        lines = [f"<th{kind}>{escape(heading)}</th>"]
        for text in cells:
            attributes = kind or (' class="wide"' if len(text) > 60 else "")
            if numeric and not kind and text != ABSENT:
                attributes = f' class="bar" style="--share: {float(text.rstrip("%")) / 100:.3f}"'
            lines.append(f"<td{attributes}>{escape(text)}</td>")
        columns.append(lines)
    head, *rows = ("".join(line) for line in zip(*columns, strict=True))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h2>{escape(shown.title[:1].upper() + shown.title[1:])}</h2>\n"
        f'<div class="box" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def make_trace(report: Report) -> dict[str, Any]:
    """A Chrome trace: a process per variant, its median and slowest frame as threads."""
    events: list[dict[str, Any]] = []
    for process, variant in enumerate(report.variants, start=1):
        if not (walls := variant.samples.wall_ms):
            continue
        order = np.argsort(walls)
        frames = {"median frame": order[(len(walls) - 1) // 2], "slowest frame": order[-1]}
        names = [("process_name", 0, variant.name)]
        for thread, (title, index) in enumerate(frames.items(), start=1):
            names.append(("thread_name", thread, title))
            events += [
                {"name": name, "ph": "X", "ts": begin_ms * 1e3, "dur": ms * 1e3, "pid": process,
                 "tid": thread, **more}
                for name, begin_ms, ms, more in _spans(variant, int(index))
            ]  # fmt: skip
        events += [
            {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
            for kind, thread, name in names
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": report.machine}


def _spans(variant: VariantReport, index: int) -> Iterator[tuple[str, float, float, Any]]:
    """Name, begin and duration in ms of a frame, of its stages and of their nodes."""
    yield "frame", 0.0, variant.samples.wall_ms[index], {}
    begin = 0.0
    for stage, times in variant.samples.stages.items():
        yield stage, begin, times[index], {}
        nodes = [n for n in variant.nodes if _GRAPH_STAGES.get(n.graph, n.graph) == stage and n.ms]
        total, at = sum(node.ms for node in nodes), begin
        for node in nodes:
            ms = times[index] * node.ms / total
            args = {"mean_ms": node.ms, "type": node.type, "kind": node.kind}
            yield node.name or node.type, at, ms, {"args": args}
            at += ms
        begin += times[index]
