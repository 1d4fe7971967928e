"""Tables of a report, and the documents that hold them between marker comments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill

from rivals.cases import CLASSES, THREADS, VGA, Case, Model
from rivals.report import CaseResult, Report, RivalResult
from zsseg_rt.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
_BLOCK = re.compile(r"<!-- benchmark (\S+) -->\n.*?<!-- end of benchmark -->", re.DOTALL)
_SOURCE = re.compile(r"<!-- benchmark source: (.+?) -->")
_MODELS: dict[Model, str] = {
    "real": "ViT-B/16 at 512x512",
    "demo": "The scenes demo's size, 128x128",
}
_NOT_MEASURED = "Not measured in this run."
_NONE = "\N{EN DASH}"
_TIMES = "\N{MULTIPLICATION SIGN}"


def filled(text: str, report: Report, file: Path) -> str:
    """A document's text with the tables of a report, which it names by its path.

    Raises:
        ArgumentError: There is no place for tables, or one for an unknown table.
    """
    if not _SOURCE.search(text) or not _BLOCK.search(text):
        raise ArgumentError("document: expected marker comments of benchmarks, got none. Add them.")

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ArgumentError(
                f"<!-- benchmark {name} -->: expected one of {', '.join(TABLES)}. Correct it."
            )
        return (
            f"<!-- benchmark {name} -->\n{TABLES[name](report).strip()}\n<!-- end of benchmark -->"
        )

    path = file.resolve()
    named = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return _BLOCK.sub(block, _SOURCE.sub(f"<!-- benchmark source: {named} -->", text))


def source_of(text: str) -> Path:
    """The report that a document was made from."""
    match = _SOURCE.search(text)
    assert match is not None
    return ROOT / match[1]


def conditions_text(report: Report) -> str:
    """Machine, versions, commit, and how busy it was."""
    machine = report.machine
    versions = ", ".join(
        f"{name} {version}"
        for name, version in machine.items()
        if name not in ("cpu", "usable_cpus", "system", "zsseg_rt")
    )
    commit, dirty, _ = report.commit.partition("-dirty")
    lines = [
        f"{machine['cpu']}, {machine['usable_cpus']} CPUs, {machine['system']}; {versions}; "
        f"commit `{commit}`{' with uncommitted changes' if dirty else ''}; "
        f"{report.seconds / 60:.1f} min in all. Weights are random: this measures "
        "speed and agreement, not accuracy."
    ]
    if report.busy:
        lines.append(
            f"**Other programs ran meanwhile: threads waited for a CPU {report.waiting:.0%} of the "
            "time. Do not quote these times; measure again on a quiet machine.**"
        )
    lines += [f"Note: {note}." for note in report.conditions.notes]
    return "\n\n".join(fill(line, 120, break_on_hyphens=False) for line in lines)


def engine_tables(report: Report) -> str:
    """Every rival at 20 classes and 640x480."""
    parts = [
        f"{_MODELS[model]}, 640x480 frame, 20 classes, {_count(_threads(report))}:\n\n"
        + _rival_table(entry)
        for model in _MODELS
        if (entry := _find(report, Case("frame", model, 20, VGA, _threads(report))))
    ]
    return "\n\n".join(parts) or _NOT_MEASURED


def classes_tables(report: Report) -> str:
    """Ratios by number of classes."""
    parts = []
    for model, title in _MODELS.items():
        cases = {
            count: case
            for count in CLASSES
            if (case := _find(report, Case("frame", model, count, VGA, _threads(report))))
        }
        if len(cases) < 2:
            continue
        names = dict.fromkeys(rival.name for case in cases.values() for rival in case.rivals)
        rows = [[name, *(_only_ratio(case, name) for case in cases.values())] for name in names]
        if base := cases.get(20):
            label = f"{base.rivals[0].name}, first table = 1"
            rows.append([label, *(_growth(case, base) for case in cases.values())])
        table = _table(["classes", *map(str, cases)], rows)
        parts.append(f"{title}, times ours by classes:\n\n{table}")
    return "\n\n".join(parts) or _NOT_MEASURED


def postprocess_tables(report: Report) -> str:
    """Milliseconds and ratios of what follows the network."""
    parts = []
    for task, title in (("labels", "Labels from logits"), ("overlay", "Labels on the frame")):
        cases = [case for case in report.cases if case.task == task]
        if not cases:
            continue
        names = [rival.name for rival in cases[0].rivals]
        rows = [
            [f"{case.classes}", _size(case.out_hw)] + [_with_ratio(case, name) for name in names]
            for case in sorted(cases, key=lambda case: (case.out_hw, case.classes))
        ]
        threads = f", {_count(cases[0].threads)}, ms (times ours)"
        parts.append(f"{title}{threads}:\n\n" + _table(["classes", "size", *names], rows))
    return "\n\n".join(parts) or _NOT_MEASURED


def absent_text(report: Report) -> str:
    """Rivals that were missing, and how to install them."""
    if not report.absent:
        return "Every rival was installed."
    return "\n".join(
        f"- {', '.join(absent.rivals)}: missing {absent.need}; `{absent.command}`"
        for absent in report.absent
    )


TABLES: dict[str, Callable[[Report], str]] = {
    "conditions": conditions_text,
    "engine": engine_tables,
    "classes": classes_tables,
    "postprocess": postprocess_tables,
    "absent": absent_text,
}


def _threads(report: Report) -> int:
    return max((case.threads for case in report.cases), default=THREADS)


def _count(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _rival_table(case: CaseResult) -> str:
    header = ["", "runs at", "times ours", "peak MB", "load s", "first s", "equal"]
    rows = [
        [
            rival.name,
            rival.precision or _NONE,
            _ratio(case, rival),
            _figure(rival.peak_mb),
            _figure(rival.load_s),
            _figure(rival.first_s),
            _NONE if rival.equal_share is None else _percent(rival.equal_share),
        ]
        for rival in case.rivals
    ]
    return _table(header, rows) + _footnote(case.rivals)


def _find(report: Report, wanted: Case) -> CaseResult | None:
    for case in report.cases:
        if all(getattr(case, name) == value for name, value in vars(wanted).items()):
            return case
    return None


def _rival(case: CaseResult, name: str) -> RivalResult:
    for rival in case.rivals:
        if rival.name == name:
            return rival
    return RivalResult(name=name, note="not measured")


def _ms(rival: RivalResult) -> str:
    if rival.ms is None:
        return rival.note.partition(":")[0] or _NONE
    return _figure(rival.ms) + (" (one call)" if rival.note else "")


def _ratio(case: CaseResult, rival: RivalResult) -> str:
    difference = rival.difference
    if difference is None:
        return _only_ratio(case, rival.name).replace(_TIMES, "")
    if difference.low is None or difference.high is None:
        return f"{1 + difference.change:.2f}"
    return f"{1 + difference.change:.2f} ({1 + difference.low:.2f} to {1 + difference.high:.2f})"


def _only_ratio(case: CaseResult, name: str) -> str:
    """How many times ours, 1.00 for ours; why not, where it was not timed."""
    rival, ours = _rival(case, name), case.rivals[0]
    if rival.difference is not None:
        return _times(1 + rival.difference.change)
    if rival.ms is None or ours.ms is None:
        return _ms(rival)
    return _times(rival.ms / ours.ms) + (" (one call)" if rival.note else "")


def _growth(case: CaseResult, base: CaseResult) -> str:
    """How many times ours of the first table our time is."""
    ours, then = case.rivals[0].ms, base.rivals[0].ms
    return _NONE if ours is None or then is None else _times(ours / then)


def _with_ratio(case: CaseResult, name: str) -> str:
    """Milliseconds, and how many times ours; of a single call, the plain ratio."""
    rival, ours = _rival(case, name), case.rivals[0]
    if rival.difference is not None:
        return f"{_ms(rival)} ({_times(1 + rival.difference.change)})"
    if rival.ms is None or ours.ms is None or rival is ours:
        return _ms(rival)
    return f"{_figure(rival.ms)} ({_times(rival.ms / ours.ms)}, one call)"


def _footnote(rivals: Iterable[RivalResult]) -> str:
    bases = {rival.difference.basis for rival in rivals if rival.difference is not None}
    if bases <= {"wall"}:
        return ""
    return "\n\nRatios are of CPU time where threads waited for a CPU over 20 % of the time."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    shown = f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.2g}" if ratio >= 2 else f"{ratio:.2f}"
    return shown + _TIMES


def _percent(share: float) -> str:
    """Rounded down: 100 % is all of them."""
    return "100 %" if share == 1.0 else f"{int(share * 1e4) / 100:.2f} %"


def _size(out_hw: tuple[int, int]) -> str:
    return f"{out_hw[1]}x{out_hw[0]}"
