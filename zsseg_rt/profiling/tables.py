"""A report as tables of plain text: the same rows for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zsseg_rt.profiling.conditions import Reading
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.nodes import OUTSIDE, has_blocks, sum_by
from zsseg_rt.profiling.report import NodeRow, Percentiles, Report, VariantReport

ABSENT = "\N{EN DASH}"
BASIS_WORDS = {"wall": "wall time", "cpu": "CPU time", "device": "GPU time"}
_PERCENTILES = ("p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Rows of text under headings.

    Attributes:
        title: What it shows.
        headings: Of the columns; all but the first are numbers.
        rows: As many cells each.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_tables(report: Report) -> list[TextTable]:
    """Every table of a report, in the order in which they are read."""
    tables = [
        _what_ran(report),
        _frames(report),
        _processors(report),
        _ship(report),
        _comparisons(report),
        _paced(report),
        *(_stages(variant) for variant in report.variants if variant.stages),
        *(_nodes(v, "block", v.nodes) for v in report.variants if has_blocks(v.nodes)),
        *(_nodes(v, "kind", v.nodes) for v in report.variants),
        _growths(report),
        _energy(report),
        _cold_starts(report),
        _conditions(report),
    ]
    return [table for table in tables if table.rows]


def versions(report: Report) -> str:
    """Processor and versions, as they stand in a report's first line."""
    machine = report.machine
    shown = [f"zsseg_rt {report.version}", f"Python {machine.get('python', ABSENT)}"]
    libraries = (one.described.get("library", "") for one in report.variants)
    shown += [library for library in dict.fromkeys(libraries) if library]
    processor = f"{machine.get('cpu', ABSENT)}, {machine.get('usable_cpus', ABSENT)} CPUs"
    return f"{processor}; {', '.join(shown)}"


def difference_words(found: Difference) -> str:
    """A verdict as a sentence."""
    interval = "no interval yet"
    if found.low is not None and found.high is not None:
        interval = f"{found.low:+.1%} to {found.high:+.1%}"
    text = f"{found.verdict}: {found.change:+.1%} ({interval}) by {BASIS_WORDS[found.basis]}"
    if found.verdict != "undecided":
        return f"{text}, {found.rounds} rounds"
    if found.rounds_needed is None:
        return f"{text}; too near {found.threshold:.1%} to be decided by more rounds"
    return (
        f"{text}; about {found.rounds_needed} rounds would decide, {found.rounds} were taken "
        "(--max-duration)"
    )


def side_by_side(first: Report, second: Report) -> list[TextTable]:
    """Two reports beside each other. They took no turns, so nothing is judged."""
    rows = []
    for name in dict.fromkeys(v.name for report in (first, second) for v in report.variants):
        cells = [name]
        for report in (first, second):
            variant = next((v for v in report.variants if v.name == name), None)
            wall = None if variant is None else variant.wall
            cells += [_ms(wall, "p50"), _ms(wall, "p95"), _ms(wall, "max")]
            cells += [number(None if variant is None else variant.frames_per_second)]
        rows.append(tuple(cells))
    columns = ("p50 ms", "p95 ms", "max ms", "frames/s")
    headings = ("variant", *(f"A {c}" for c in columns), *(f"B {c}" for c in columns))
    same = {reading.name: reading for reading in second.conditions.readings}
    conditions = tuple(
        (reading.name, _reading(reading), _reading(same.get(reading.name)))
        for reading in first.conditions.readings
    )
    machines = tuple(
        (key, first.machine.get(key, ABSENT), second.machine.get(key, ABSENT))
        for key in dict.fromkeys([*first.machine, *second.machine])
    )
    return [
        TextTable(title="frames", headings=headings, rows=tuple(rows)),
        TextTable(title="conditions", headings=("", "A", "B"), rows=conditions),
        TextTable(title="machines", headings=("", "A", "B"), rows=machines),
    ]


def number(value: float | None, digits: int = 2) -> str:
    """A figure with that many decimals below ten, one or none above; a dash for None."""
    if value is None:
        return ABSENT
    if abs(value) < 10:
        return f"{value:.{digits}f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def share(value: float | None) -> str:
    """A share in per cent; a dash for None."""
    return ABSENT if value is None else f"{value:.1%}"


def _ms(times: Percentiles | None, name: str) -> str:
    return number(None if times is None else getattr(times, name))


def _what_ran(report: Report) -> TextTable:
    """Everything that a figure must be quoted with, as trtexec's heading has it."""
    names = ("device", "backend", "precision", "threads", "input")
    rows = tuple(
        (one.name, *(one.described.get(name, ABSENT) for name in names), one.frame,
         str(one.classes))
        for one in report.variants
    )  # fmt: skip
    headings = ("variant", *names, "frames", "classes")
    return TextTable(title="what ran", headings=headings, rows=rows)


def _frames(report: Report) -> TextTable:
    headings = ("variant", "frames", *(f"{name} ms" for name in _PERCENTILES), "frames/s")
    rows = []
    for one in report.variants:
        row = [one.name, str(one.wall.count if one.wall else 0)]
        row += [_ms(one.wall, name) for name in _PERCENTILES]
        rows.append((*row, number(one.frames_per_second)))
    return TextTable(title="frames", headings=headings, rows=tuple(rows))


def _processors(report: Report) -> TextTable:
    headings = ["variant", "p50 95 %", "CPU ms", "waiting", "GPU ms", "cold p50", "cold max"]
    rows = []
    for one in report.variants:
        interval = ABSENT
        if one.wall is not None and one.wall.p50_low is not None:
            interval = f"{number(one.wall.p50_low)} to {number(one.wall.p50_high)}"
        row = [one.name, interval, _ms(one.cpu, "mean"), share(one.waiting)]
        row += [_ms(one.device, "p50"), _ms(one.cold, "p50"), _ms(one.cold, "max")]
        rows.append(tuple(row))
    return TextTable(title="more about them", headings=tuple(headings), rows=tuple(rows))


def _ship(report: Report) -> TextTable:
    """Which one to ship: one row a variant, where there are several or labels were judged."""
    headings = ["variant", "size MB", "load s", "peak MB", "p50 ms", "p95 ms", "frames/s"]
    headings += ["mJ", "as float32", "mIoU %"]
    rows = []
    for one in report.variants:
        load = next((start.load_s for start in one.cold_starts if start.cached), None)
        row = [one.name, number(one.size_mb), number(load), number(one.peak_mb)]
        row += [_ms(one.wall, "p50"), _ms(one.wall, "p95"), number(one.frames_per_second)]
        row.append(number(None if one.energy is None else one.energy.mj))
        rows.append((*row, share(one.agreement), number(one.miou)))
    judged = any(one.miou is not None for one in report.variants)
    shown = tuple(rows) if judged or len(rows) > 1 else ()
    return TextTable(title="which to ship", headings=tuple(headings), rows=shown)


def _comparisons(report: Report) -> TextTable:
    rows = tuple((one.other, difference_words(one.difference)) for one in report.comparisons)
    base = report.variants[0].name if report.variants else ""
    return TextTable(title=f"against {base}", headings=("variant", "verdict"), rows=rows)


def _paced(report: Report) -> TextTable:
    headings = ["variant", "frames/s", "frames", "late"]
    headings += [*_PERCENTILES, "service p50", "service p99"]
    rows = []
    for one in report.variants:
        if one.paced is not None:
            paced = one.paced
            row = [one.name, number(paced.rate), str(paced.frames), str(paced.late)]
            row += [_ms(paced.latency, name) for name in _PERCENTILES]
            rows.append((*row, _ms(paced.service, "p50"), _ms(paced.service, "p99")))
    return TextTable(
        title="latency in ms of frames that fall due by a clock",
        headings=tuple(headings),
        rows=tuple(rows),
    )


def _stages(variant: VariantReport) -> TextTable:
    total = sum(times.mean for times in variant.stages.values())
    rows = tuple(
        (name, *(_ms(times, p) for p in _PERCENTILES), number(times.mean),
         share(times.mean / total if total else None))
        for name, times in variant.stages.items()
    )  # fmt: skip
    headings = ("stage", *(f"{name} ms" for name in _PERCENTILES), "mean ms", "of the frame")
    return TextTable(title=f"stages of {variant.name}", headings=headings, rows=rows)


def _nodes(variant: VariantReport, key: str, nodes: Sequence[NodeRow]) -> TextTable:
    totals = sum_by(nodes, lambda node: f"{node.graph}  {getattr(node, key)}")
    graphs = sum_by(nodes, lambda node: node.graph)
    order = list(totals)
    if key == "kind":
        places = list(graphs)
        order.sort(key=lambda name: (
            places.index(name.partition("  ")[0]), name.endswith(OUTSIDE), -totals[name]
        ))  # fmt: skip
    rows = []
    for name in order:
        graph, _, group = name.partition("  ")
        rows.append((graph, group, number(totals[name], 3), share(totals[name] / graphs[graph])))
    headings = ("graph", key, "ms", "of the graph")
    title = f"nodes of {variant.name} by {key}"
    return TextTable(title=title, headings=headings, rows=tuple(rows))


def _growths(report: Report) -> TextTable:
    rows = tuple(
        (
            growth.key,
            f"{number(growth.fixed_ms)} ms + {number(growth.per_unit_ms, 4)} ms a {growth.unit}",
            BASIS_WORDS[growth.basis],
            share(growth.worst_error),
        )
        for growth in report.growths
    )
    headings = ("sweep", "fitted to the medians", "of", "largest distance")
    return TextTable(title="growth", headings=headings, rows=rows)


def _energy(report: Report) -> TextTable:
    headings = ("variant", "mJ a frame", "above idle", "W", "idle W", "frames", "source")
    rows = tuple(
        (one.name, number(one.energy.mj), number(one.energy.mj_above_idle),
         number(one.energy.watts), number(one.energy.idle_watts), str(one.energy.frames),
         one.energy.source)
        for one in report.variants
        if one.energy is not None
    )  # fmt: skip
    return TextTable(title="energy", headings=headings, rows=rows)


def _cold_starts(report: Report) -> TextTable:
    headings = ("variant", "cache", "import s", "load s", "classes s", "first frame s", "peak MB")
    rows = tuple(
        (one.name, "with" if start.cached else "without", number(start.import_s, 4),
         number(start.load_s), number(start.classes_s, 4), number(start.first_frame_s, 4),
         number(start.peak_mb))
        for one in report.variants
        for start in one.cold_starts
    )  # fmt: skip
    return TextTable(title="a fresh process", headings=headings, rows=rows)


def _conditions(report: Report) -> TextTable:
    rows = tuple(_condition_rows(report.conditions.readings))
    return TextTable(title="conditions", headings=("", "value", "note"), rows=rows)


def _condition_rows(readings: Sequence[Reading]) -> Iterator[tuple[str, ...]]:
    for reading in readings:
        note = ""
        if reading.value is None:
            note = f"{reading.reason}; see: {reading.command}"
        elif reading.before is not None:
            note = f"{number(reading.before, 1)} before"
        yield reading.name, _reading(reading), note


def _reading(reading: Reading | None) -> str:
    if reading is None or reading.value is None:
        return ABSENT
    if isinstance(reading.value, str):
        return reading.value
    if not reading.unit:
        return share(reading.value)
    return f"{number(reading.value)} {reading.unit}"
