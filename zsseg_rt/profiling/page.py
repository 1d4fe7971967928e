"""A report as one HTML file that needs nothing from outside; bars are drawn by its style."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from zsseg_rt.profiling.report import Report
from zsseg_rt.profiling.tables import (
    ABSENT,
    TextTable,
    difference_words,
    report_tables,
    versions,
)
from zsseg_rt.results.visualize import save_file

_FIGURE = re.compile(rf"[-+{ABSENT}0-9.,% to]*( (ms|s|MB|MHz|°C))?")
_BAR = ' class="bar"'
_STYLE = """
:root { color-scheme: light; --line: #dcdfe4; --dim: #5b6472; --ink: #16191f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 24px 20px 48px; background: #fff;
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 30px 0 8px; }
p { margin: 4px 0; } .dim { color: var(--dim); }
.verdicts { list-style: none; padding: 0; margin: 16px 0 0; }
.verdicts li { border-left: 4px solid var(--dim); background: #f6f7f9; padding: 8px 12px;
  margin: 6px 0; border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.verdicts .slower, .verdicts .failed { border-color: #d1402f; }
.verdicts .faster { border-color: #2b8a3e; } .verdicts .equal { border-color: #4269d0; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 4px 0;
  background: linear-gradient(to right, #fff 30%, #fff0) left / 40px 100% local,
    linear-gradient(to left, #fff 30%, #fff0) right / 40px 100% local,
    linear-gradient(to right, #0000001f, #0000) left / 12px 100% scroll,
    linear-gradient(to left, #0000001f, #0000) right / 12px 100% scroll;
  background-repeat: no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 12px; text-align: left; white-space: nowrap; vertical-align: top; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; }
td.wide { white-space: normal; min-width: 260px; }
td.bar { min-width: 180px; background: linear-gradient(#bcd0f5, #bcd0f5) no-repeat left 12px center;
  background-size: calc(var(--share) * (100% - 24px)) 70%; }
tbody tr + tr td { border-top: 1px solid #eef0f3; }
code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9;
  border-radius: 6px; padding: 10px 12px; font: 13px/1.5 ui-monospace, monospace; }
"""


def write_html(path: Path, report: Report) -> None:
    """Write a report as a page."""
    save_file(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """The whole page."""
    title = f"Profile of {report.variants[0].name}" if report.variants else "Profile"
    body = "\n".join(_body(report, title))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


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
        (one.difference.verdict, f"{one.other}: {difference_words(one.difference)}")
        for one in report.comparisons
    ]
    lines += [("failed", f"failed: {v.failure}") for v in report.variants if v.failure]
    lines += [("note", note) for note in report.notes]
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
