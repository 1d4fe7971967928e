"""A report as tables of plain text: the same rows for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from zsseg_rt.profiling.conditions import Reading
from zsseg_rt.profiling.estimates import Difference
from zsseg_rt.profiling.nodes import OUTSIDE, has_blocks, sum_by
from zsseg_rt.profiling.report import NodeRow, Report, VariantReport

ABSENT = "\N{EN DASH}"
BASIS_WORDS = {"wall": "wall time", "cpu": "CPU time", "device": "GPU time"}
_PERCENTILES = ("p50", "p90", "p95", "p99", "max")
Cell = Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Rows of text under headings; all columns but the first are numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(title: str, items: Iterable[Any], columns: dict[str, Cell]) -> TextTable:
    """A row for each item, a cell for each column."""
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return TextTable(title=title, headings=tuple(columns), rows=rows)


def report_tables(report: Report) -> list[TextTable]:
    """Every table of a report that has rows, in the order in which they are read."""
    variants = report.variants
    several = len(variants) > 1 or any(one.miou is not None for one in variants)
    base = variants[0].name if variants else ""
    growths, readings = report.growths, report.conditions.readings
    starts = [(one.name, start) for one in variants for start in one.cold_starts]
    tables = [
        table("what ran", variants, _WHAT_RAN),
        table("frames", variants, _FRAMES),
        table("more about them", variants, _PROCESSORS),
        table("which to ship", variants if several else (), _SHIP),
        table(f"against {base}", report.comparisons, _COMPARED),
        table(
            "latency in ms of frames that fall due by a clock",
            (one for one in variants if one.paced is not None),
            _PACED,
        ),
        *map(_stages, variants),
        *(_nodes(one, "block") for one in variants if has_blocks(one.nodes)),
        *(_nodes(one, "kind") for one in variants),
        table("growth", growths, _GROWTH),
        table("energy", (one for one in variants if one.energy is not None), _ENERGY),
        table("a fresh process", starts, _STARTS),
        table("conditions", readings, {"": _text("name"), "value": _reading, "note": _note}),
    ]
    return [shown for shown in tables if shown.rows]


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
    sides = {"A": first, "B": second}
    variants = {side: {one.name: one for one in report.variants} for side, report in sides.items()}
    figures = {"p50 ms": _ms("wall.p50"), "p95 ms": _ms("wall.p95"), "max ms": _ms("wall.max"),
               "frames/s": _ms("frames_per_second")}  # fmt: skip

    def of(side: str, cell: Cell) -> Cell:
        return lambda name: cell(variants[side].get(name))

    columns = {f"{side} {what}": of(side, cell) for side in sides for what, cell in figures.items()}
    readings = {
        side: {one.name: one for one in report.conditions.readings}
        for side, report in sides.items()
    }
    conditions: dict[str, Cell] = {
        "": str,
        "A": lambda name: _reading(readings["A"].get(name)),
        "B": lambda name: _reading(readings["B"].get(name)),
    }
    machines: dict[str, Cell] = {
        "": str,
        "A": lambda key: first.machine.get(key, ABSENT),
        "B": lambda key: second.machine.get(key, ABSENT),
    }
    return [
        table("frames", variants["A"] | variants["B"], {"variant": str, **columns}),
        table("conditions", readings["A"], conditions),
        table("machines", first.machine | second.machine, machines),
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


def _at(path: str, show: Cell, item: Any) -> str:
    """What a path of attributes leads to; a dash where a part of it is None."""
    for name in path.split("."):
        item = None if item is None else getattr(item, name)
    return ABSENT if item is None else show(item)


def _text(path: str) -> Cell:
    return partial(_at, path, str)


def _ms(path: str, digits: int = 2) -> Cell:
    return partial(_at, path, partial(number, digits=digits))


def _percentiles(path: str = "", unit: str = "") -> dict[str, Cell]:
    return {f"{name}{unit}": _ms(f"{path}{name}") for name in _PERCENTILES}


def _described(name: str) -> Cell:
    return lambda one: str(one.described.get(name, ABSENT))


def _interval(one: VariantReport) -> str:
    low = _ms("wall.p50_low")(one)
    return ABSENT if low == ABSENT else f"{low} to {_ms('wall.p50_high')(one)}"


def _cached_load(one: VariantReport) -> str:
    return number(next((start.load_s for start in one.cold_starts if start.cached), None))


def _second(cell: Cell) -> Cell:
    return lambda pair: cell(pair[1])


_NAME: dict[str, Cell] = {"variant": _text("name")}
_WHAT_RAN: dict[
    str, Cell
] = {  # everything that a figure must be quoted with, as trtexec's heading has it
    **_NAME,
    **{name: _described(name) for name in ("device", "backend", "precision", "threads", "input")},
    "frames": _text("frame"),
    "classes": _text("classes"),
}
_FRAMES: dict[str, Cell] = {
    **_NAME,
    "frames": lambda one: str(one.wall.count if one.wall else 0),
    **_percentiles("wall.", " ms"),
    "frames/s": _ms("frames_per_second"),
}
_PROCESSORS: dict[str, Cell] = {
    **_NAME,
    "p50 95 %": _interval,
    "CPU ms": _ms("cpu.mean"),
    "waiting": partial(_at, "waiting", share),
    "GPU ms": _ms("device.p50"),
    "cold p50": _ms("cold.p50"),
    "cold max": _ms("cold.max"),
}
_SHIP: dict[str, Cell] = {  # one row a variant, where there are several or labels were judged
    **_NAME,
    "size MB": _ms("size_mb"),
    "load s": _cached_load,
    "peak MB": _ms("peak_mb"),
    "p50 ms": _ms("wall.p50"),
    "p95 ms": _ms("wall.p95"),
    "frames/s": _ms("frames_per_second"),
    "mJ": _ms("energy.mj"),
    "as float32": partial(_at, "agreement", share),
    "mIoU %": _ms("miou"),
}
_COMPARED: dict[str, Cell] = {
    "variant": _text("other"),
    "verdict": lambda one: difference_words(one.difference),
}
_PACED: dict[str, Cell] = {
    **_NAME,
    "frames/s": _ms("paced.rate"),
    "frames": _text("paced.frames"),
    "late": _text("paced.late"),
    **_percentiles("paced.latency."),
    "service p50": _ms("paced.service.p50"),
    "service p99": _ms("paced.service.p99"),
}
_GROWTH: dict[str, Cell] = {
    "sweep": _text("key"),
    "fitted to the medians": lambda one: (
        f"{number(one.fixed_ms)} ms + {number(one.per_unit_ms, 4)} ms a {one.unit}"
    ),
    "of": lambda one: BASIS_WORDS[one.basis],
    "largest distance": partial(_at, "worst_error", share),
}
_ENERGY: dict[str, Cell] = {
    **_NAME,
    "mJ a frame": _ms("energy.mj"),
    "above idle": _ms("energy.mj_above_idle"),
    "W": _ms("energy.watts"),
    "idle W": _ms("energy.idle_watts"),
    "frames": _text("energy.frames"),
    "source": _text("energy.source"),
}
_STARTS: dict[str, Cell] = {
    "variant": lambda pair: str(pair[0]),
    "cache": lambda pair: "with" if pair[1].cached else "without",
    "import s": _second(_ms("import_s", 4)),
    "load s": _second(_ms("load_s")),
    "classes s": _second(_ms("classes_s", 4)),
    "first frame s": _second(_ms("first_frame_s", 4)),
    "peak MB": _second(_ms("peak_mb")),
}


def _stages(variant: VariantReport) -> TextTable:
    total = sum(times.mean for times in variant.stages.values())
    columns: dict[str, Cell] = {
        "stage": lambda pair: str(pair[0]),
        **{name: _second(cell) for name, cell in _percentiles(unit=" ms").items()},
        "mean ms": _second(_ms("mean")),
        "of the frame": lambda pair: share(pair[1].mean / total if total else None),
    }
    return table(f"stages of {variant.name}", variant.stages.items(), columns)


def _nodes(variant: VariantReport, key: str) -> TextTable:
    """Milliseconds by block, in the network's order, or by kind, the longest first."""

    def group(node: NodeRow) -> tuple[str, str]:
        return node.graph, str(getattr(node, key))

    totals = sum_by(variant.nodes, group)
    graphs = sum_by(variant.nodes, lambda node: node.graph)
    order, places = list(totals), list(graphs)
    if key == "kind":
        order.sort(key=lambda one: (places.index(one[0]), one[1] == OUTSIDE, -totals[one]))
    columns: dict[str, Cell] = {
        "graph": lambda one: one[0],
        key: lambda one: one[1],
        "ms": lambda one: number(totals[one], 3),
        "of the graph": lambda one: share(totals[one] / graphs[one[0]]),
    }
    return table(f"nodes of {variant.name} by {key}", order, columns)


def _note(reading: Reading) -> str:
    if reading.value is None:
        return f"{reading.reason}; see: {reading.command}"
    return "" if reading.before is None else f"{number(reading.before, 1)} before"


def _reading(reading: Reading | None) -> str:
    if reading is None or reading.value is None:
        return ABSENT
    if isinstance(reading.value, str):
        return reading.value
    return f"{number(reading.value)} {reading.unit}" if reading.unit else share(reading.value)
