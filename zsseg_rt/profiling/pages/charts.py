"""Charts of a report as SVG for inlining; needs matplotlib (extra ``report``)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zsseg_rt.profiling.nodes import KINDS, has_blocks
from zsseg_rt.profiling.pages.tables import BASIS_WORDS
from zsseg_rt.profiling.report import Growth, NodeRow, Report, VariantReport

_WIDTH = 8.4  # inches of 96 pixels
_COLOURS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e", "#97bbf5",
            "#ff8ab7", "#9498a0")  # fmt: skip
_BINS = 60
_MOST_POINTS = 3000
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e4e4", "axes.axisbelow": True,
}  # fmt: skip


def draw_charts(report: Report) -> list[tuple[str, str]]:
    """Titles and SVG elements of every chart that has data."""
    import matplotlib

    drawn: list[tuple[str, str]] = []
    with matplotlib.rc_context(_STYLE):
        for title, figure in _figures(report):
            with matplotlib.rc_context({"svg.hashsalt": f"chart{len(drawn)}"}):
                drawn.append((title, _svg(figure, title)))
    return drawn


def _figures(report: Report) -> Iterator[tuple[str, Any]]:
    timed = [variant for variant in report.variants if variant.samples.wall_ms]
    staged = [variant for variant in timed if variant.stages]
    if staged:
        yield "Stages (mean milliseconds)", _stage_bars(staged)
    if timed:
        yield "How the times spread: every frame", _histogram(timed)
        yield "In the order they were taken", _timeline(timed)
    for variant in report.variants:
        if variant.nodes:
            yield f"Nodes of {variant.name}, by kind of work", _nodes(variant)
    for growth in report.growths:
        yield f"Growth with {growth.key}", _growth(growth)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _stage_bars(variants: Sequence[VariantReport]) -> Any:
    figure, axes = _figure(1.3 + 0.42 * len(variants))
    stages = list(dict.fromkeys(stage for variant in variants for stage in variant.stages))
    left = np.zeros(len(variants))
    rows = np.arange(len(variants))
    for index, stage in enumerate(stages):
        means = [
            variant.stages[stage].mean if stage in variant.stages else 0.0 for variant in variants
        ]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.barh(rows, means, left=left, color=colour, height=0.66, label=stage)
        left += np.array(means)
    axes.set_yticks(rows, [_short(variant.name) for variant in variants])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return figure


def _histogram(variants: Sequence[VariantReport]) -> Any:
    """One row a variant on one axis of milliseconds, so that modes can be compared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.6 + 1.05 * len(variants)), layout="constrained")
    rows = figure.subplots(len(variants), 1, sharex=True, squeeze=False)[:, 0]
    times = np.concatenate([variant.samples.wall_ms for variant in variants])
    span = max(float(times.max() / times.min()), 1.01)
    spread = span > 20  # clipped would hide the slow ones, linear would hide the rest
    low, high = float(times.min()), float(times.min()) * span
    bins = np.geomspace(low, high, _BINS) if spread else np.linspace(low, high, _BINS)
    for index, (variant, axes) in enumerate(zip(variants, rows, strict=True)):
        axes.hist(variant.samples.wall_ms, bins=bins, color=_COLOURS[index % len(_COLOURS)])
        axes.set_title(_short(variant.name), loc="left", fontsize=9)
        axes.set_ylabel("frames", fontsize=9)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if spread:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
    rows[-1].set_xlabel("ms (logarithmic)" if spread else "ms")
    return figure


def _timeline(variants: Sequence[VariantReport]) -> Any:
    figure, axes = _figure(3.2)
    each = max(1, _MOST_POINTS // len(variants))
    for index, variant in enumerate(variants):
        samples = variant.samples
        # The slowest are always drawn; of the rest, as many as a browser can take.
        slowest = np.argsort(samples.wall_ms)[-each // 4 :]
        spread = np.linspace(0, len(samples.wall_ms) - 1, each).astype(int)
        chosen = np.unique(np.concatenate([slowest, spread]))
        axes.plot(
            np.array(samples.rounds)[chosen], np.array(samples.wall_ms)[chosen], ".",
            markersize=3.5, alpha=0.7, color=_COLOURS[index % len(_COLOURS)],
            label=_short(variant.name),
        )  # fmt: skip
    axes.set_xlabel("round")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, markerscale=2)
    return figure


def _nodes(variant: VariantReport) -> Any:
    """A bar for each block of each graph, or for the graph where blocks are not known."""
    groups: dict[str, list[NodeRow]] = {}
    blocks = has_blocks(variant.nodes)
    for node in variant.nodes:
        groups.setdefault(f"{node.graph} {node.block if blocks else ''}".strip(), []).append(node)
    figure, axes = _figure(1.1 + 0.3 * len(groups))
    left, rows = np.zeros(len(groups)), np.arange(len(groups))
    for index, kind in enumerate(KINDS):
        times = [sum(n.ms for n in nodes if n.kind == kind) for nodes in groups.values()]
        axes.barh(rows, times, left=left, color=_COLOURS[index], height=0.7, label=kind)
        left += np.array(times)
    axes.set_yticks(rows, [_short(name) for name in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return figure


def _growth(growth: Growth) -> Any:
    figure, axes = _figure(3.0)
    counts, times = np.array(growth.points).T
    ends = np.array([0.0, counts.max() * 1.05])
    line = growth.fixed_ms + growth.per_unit_ms * ends
    axes.plot(ends, line, color="#9498a0", linewidth=1)
    axes.plot(counts, times, "o", color=_COLOURS[0])
    axes.set_xlabel(growth.key if growth.key != "frame" else "megapixels")
    axes.set_ylabel(f"p50 ms of {BASIS_WORDS[growth.basis]}")
    axes.set_ylim(0, 1.08 * max(times.max(), line.max()))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:20]}…{name[-18:]}"


def _svg(figure: Any, title: str) -> str:
    """The drawing as one element, without what only files need, named for screen readers."""
    from html import escape

    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=96, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    label = escape(title, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
