"""Charts of a report as SVG for inlining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from zsseg_rt.profiling.nodes import KINDS, has_blocks
from zsseg_rt.profiling.pages import svg
from zsseg_rt.profiling.pages.svg import LEFT, RIGHT, TOP, WIDTH, Drawing
from zsseg_rt.profiling.pages.tables import BASIS_WORDS
from zsseg_rt.profiling.report import Growth, NodeRow, Report, VariantReport

_COLOURS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e", "#97bbf5",
            "#ff8ab7", "#9498a0")  # fmt: skip
_BINS = 60
_MOST_POINTS = 3000
_END = WIDTH - RIGHT


def draw_charts(report: Report) -> list[tuple[str, str]]:
    """Titles and SVG elements of every chart that has data."""
    return [(title, drawing.svg()) for title, drawing in _drawings(report)]


def _drawings(report: Report) -> Iterator[tuple[str, Drawing]]:
    timed = [variant for variant in report.variants if variant.samples.wall_ms]
    staged = [variant for variant in timed if variant.stages]
    if staged:
        title = "Stages (mean milliseconds)"
        yield title, _stage_bars(title, staged)
    if timed:
        title = "How the times spread: every frame"
        yield title, _histogram(title, timed)
        title = "In the order they were taken"
        yield title, _timeline(title, timed)
    for variant in report.variants:
        if variant.nodes:
            title = f"Nodes of {variant.name}, by kind of work"
            yield title, _nodes(title, variant)
    for growth in report.growths:
        title = f"Growth with {growth.key}"
        yield title, _growth(title, growth)


def _stage_bars(title: str, variants: Sequence[VariantReport]) -> Drawing:
    stages = list(dict.fromkeys(stage for variant in variants for stage in variant.stages))
    rows = [
        [variant.stages[stage].mean if stage in variant.stages else 0.0 for stage in stages]
        for variant in variants
    ]
    return _bars(title, [variant.name for variant in variants], stages, rows)


def _nodes(title: str, variant: VariantReport) -> Drawing:
    """A bar for each block of each graph, or for the graph where blocks are not known."""
    groups: dict[str, list[NodeRow]] = {}
    blocks = has_blocks(variant.nodes)
    for node in variant.nodes:
        groups.setdefault(f"{node.graph} {node.block if blocks else ''}".strip(), []).append(node)
    rows = [
        [sum(node.ms for node in nodes if node.kind == kind) for kind in KINDS]
        for nodes in groups.values()
    ]
    return _bars(title, list(groups), KINDS, rows)


def _bars(
    title: str, names: Sequence[str], kinds: Sequence[str], rows: Sequence[Sequence[float]]
) -> Drawing:
    """A bar per name, whose parts are kinds."""
    drawing = Drawing(title, TOP + 26 * len(names) + svg.BOTTOM)
    drawing.legend([(kind, _colour(index)) for index, kind in enumerate(kinds)])
    high = max(sum(row) for row in rows) or 1.0
    x = svg.linear(0.0, high, LEFT, _END)
    svg.axis_below(drawing, x, svg.ticks(0.0, high), TOP, "ms")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        y, begin = TOP + 26 * number, 0.0
        drawing.text(LEFT - 6, y + 17, _short(name), "end")
        for index, value in enumerate(row):
            drawing.rect(x(begin), y + 4, x(begin + value) - x(begin), 18, _colour(index))
            begin += value
    return drawing


def _histogram(title: str, variants: Sequence[VariantReport]) -> Drawing:
    """One row a variant on one axis of milliseconds, so that modes can be compared."""
    row = 84
    drawing = Drawing(title, 10 + row * len(variants) + svg.BOTTOM)
    times = np.concatenate([variant.samples.wall_ms for variant in variants])
    low, span = float(times.min()), max(float(times.max() / times.min()), 1.01)
    high, spread = low * span, span > 20  # clipped would hide the slow, linear the rest
    bins = np.geomspace(low, high, _BINS) if spread else np.linspace(low, high, _BINS)
    x = (svg.logarithmic if spread else svg.linear)(low, high, LEFT, _END)
    values = svg.powers(low, high) if spread else svg.ticks(low, high)
    svg.axis_below(drawing, x, values, 10, "ms (logarithmic)" if spread else "ms")
    for index, variant in enumerate(variants):
        counts, _ = np.histogram(variant.samples.wall_ms, bins=bins)
        floor = 10 + row * (index + 1)
        drawing.text(LEFT - 6, floor - 30, _short(variant.name), "end")
        drawing.text(LEFT - 6, floor - 14, f"up to {counts.max()} frames", "end")
        for count, begin, end in zip(counts.tolist(), bins[:-1], bins[1:], strict=True):
            height = (row - 18) * count / max(int(counts.max()), 1)
            drawing.rect(x(begin), floor - height, x(end) - x(begin) - 0.5, height, _colour(index))
    return drawing


def _timeline(title: str, variants: Sequence[VariantReport]) -> Drawing:
    drawing = Drawing(title, 320)
    drawing.legend([(_short(v.name), _colour(index)) for index, v in enumerate(variants)])
    last = max(max(variant.samples.rounds) for variant in variants)
    high = 1.05 * max(max(variant.samples.wall_ms) for variant in variants)
    x, y = _plane(drawing, (last, high), "round", "ms")
    each = max(1, _MOST_POINTS // len(variants))
    for index, variant in enumerate(variants):
        walls, rounds = variant.samples.wall_ms, variant.samples.rounds
        # The slowest are always drawn; of the rest, as many as a browser can take.
        slowest = np.argsort(walls)[-each // 4 :]
        spread = np.linspace(0, len(walls) - 1, each).astype(int)
        for place in np.unique(np.concatenate([slowest, spread])).tolist():
            drawing.dot(x(rounds[place]), y(walls[place]), _colour(index))
    return drawing


def _growth(title: str, growth: Growth) -> Drawing:
    drawing = Drawing(title, 300)
    last = 1.05 * max(count for count, _ in growth.points)
    end = growth.fixed_ms + growth.per_unit_ms * last
    high = 1.08 * max(end, growth.fixed_ms, *(ms for _, ms in growth.points))
    unit = growth.key if growth.key != "frame" else "megapixels"
    x, y = _plane(drawing, (last, high), unit, "p50 ms")
    drawing.line((x(0.0), y(growth.fixed_ms)), (x(last), y(end)), "#9498a0")
    drawing.text(LEFT, TOP - 10, f"p50 ms of {BASIS_WORDS[growth.basis]}")
    for count, ms in growth.points:
        drawing.dot(x(count), y(ms), _COLOURS[0], radius=4)
    return drawing


def _plane(
    drawing: Drawing, most: tuple[float, float], across: str, upwards: str
) -> tuple[svg.Scale, svg.Scale]:
    """Draw two axes that begin at 0; returns what places values on them."""
    x = svg.linear(0.0, most[0], LEFT, _END)
    y = svg.linear(0.0, most[1], drawing.height - svg.BOTTOM, TOP)
    svg.axis_below(drawing, x, svg.ticks(0.0, most[0]), TOP, across)
    svg.axis_beside(drawing, y, svg.ticks(0.0, most[1]), upwards)
    return x, y


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:13]}…{name[-12:]}"
