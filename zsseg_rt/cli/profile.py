"""``zsseg-rt profile``: where the time goes, and which of two is faster."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.evaluate import DataOptions
from zsseg_rt.cli.options import (
    WORDS,
    ComputeOptions,
    DemoOption,
    JsonOption,
    NamedClasses,
    Takes,
    TemplateOption,
    choose_bundle,
    opt,
    takes_groups,
)
from zsseg_rt.cli.output import (
    EXIT_FAILURE,
    EXIT_GATE,
    EXIT_OK,
    UsageError,
    check_file_place,
    say,
    terminal,
    write_json,
)
from zsseg_rt.common.extras import install_command
from zsseg_rt.common.settings import changed
from zsseg_rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from zsseg_rt.profiling.page import TextTable
    from zsseg_rt.profiling.report import Report
    from zsseg_rt.profiling.workload import Variant

SHOW = "show"


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Variants that take turns with the bundle, and from where one counts as slower."""

    against: list[str] | None = opt("Another bundle, or settings KEY=VALUE,...; may repeat.")
    against_python: str | None = opt("Interpreter whose zsseg_rt is compared with this one.")
    sweep: list[str] | None = opt("classes, threads, precision, backend, streams or frame=V,V...")
    threshold: str = opt("Changes up to this count as equal.", "2%")
    fail_above: str | None = opt("Exit with 3 if a variant is slower by more, such as 5%.")
    strict: bool = opt("With --fail-above: also exit with 3 if undecided.", False, "--strict")

    def gate(self) -> float | None:
        """The share of ``--fail-above``; None without it."""
        gate = None if self.fail_above is None else _share("--fail-above", self.fail_above)
        if self.strict and gate is None:
            raise UsageError("--strict: expected --fail-above with it, got none")
        if gate is not None and not (self.against or self.against_python):
            raise UsageError("--fail-above: expected --against or --against-python, got none")
        return gate


@dataclass(frozen=True, kw_only=True)
class _Measured:
    rate: float | None = opt("Also label frames that fall due at this rate per second.")
    max_duration: float = opt("Seconds after which no further round begins.", 30.0)
    cold_start: bool = opt("Also time fresh processes.", True)
    nodes: bool = opt("Also time the nodes of the graphs.", True)
    limit: int | None = opt("Use at most this many images of the data set.", min=1)
    nvtx: bool = opt("Mark frames and stages for Nsight Systems.", False, "--nvtx")

    def __post_init__(self) -> None:
        for name, value in (("--rate", self.rate), ("--max-duration", self.max_duration)):
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise UsageError(f"{name}: expected a number above 0, got {value:g}")
        if self.nvtx and find_spec("nvtx") is None:
            raise BackendUnavailableError(
                "nvtx: expected to be installed for --nvtx, got nothing. "
                f"Run: {install_command('nvtx')}"
            )


@dataclass(frozen=True, kw_only=True)
class _Workload(NamedClasses):
    demo: DemoOption = None
    source: list[str] | None = opt("Photos, a folder or a video; may repeat; default: the demo's.")
    template: TemplateOption = None


@dataclass(frozen=True, kw_only=True)
class _Reports:
    """Files to write; refuses those that cannot all be written."""

    html: Path | None = opt("Write an HTML report.")
    trace: Path | None = opt("Write a Chrome trace of two frames, for Perfetto.")
    json_file: JsonOption = None

    def __post_init__(self) -> None:
        options = {"--json": self.json_file, "--html": self.html, "--trace": self.trace}
        files = {option: file for option, file in options.items() if file is not None}
        for option, file in files.items():
            check_file_place(option, file)
            if [other.resolve() for other in files.values()].count(file.resolve()) > 1:
                raise UsageError(f"{option}: expected a file of its own, got {file}")

    def write(self, report: Report) -> None:
        """Before tables are printed: whoever reads those may stop reading."""
        from zsseg_rt.profiling.page import make_trace, render_html
        from zsseg_rt.results.visualize import save_file

        write_json(self.json_file, report)
        if self.trace is not None:
            write_json(self.trace, make_trace(report))
        if self.html is not None:
            save_file(self.html, render_html(report).encode())


@takes_groups
def profile(
    *,
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="BUNDLE", help="Bundle NAME.zsseg; or: show A.json..."),
    ] = None,
    labelled: _Workload,
    compared: _Compared,
    data: Annotated[DataOptions, Takes("dataset", "root", "split", dataset="")],
    measured: _Measured,
    run: ComputeOptions,
    reports: _Reports,
) -> int:
    """Time a bundle's frames, stages and start; compare it with other bundles and settings.

    docs/profiling.md explains the columns and the verdicts.
    """
    if targets and targets[0] == SHOW:
        return _show(targets[1:])
    from zsseg_rt.bundles.pretrained import find_bundle
    from zsseg_rt.profiling.workload import Variant
    from zsseg_rt.stream.source import redact

    gate = compared.gate()
    if targets and len(targets) > 1:
        raise UsageError(f"expected one bundle, got {', '.join(targets)}; use --against for others")
    lacking = "name a bundle: zsseg-rt profile NAME.zsseg"
    named = Path(targets[0]) if targets else None
    bundle = find_bundle(choose_bundle(named, targets, demo=labelled.demo, missing=lacking))
    config = changed(run) | ({"with_nvtx": True} if measured.nvtx else {})
    variants = _variants(Variant(name=bundle.name, bundle=bundle, config=config), compared)
    report = _run(
        labelled,
        variants=variants,
        threshold=_share("--threshold", compared.threshold) if gate is None else gate,
        max_seconds=measured.max_duration,
        rate=measured.rate,
        cold_starts=measured.cold_start,
        nodes=measured.nodes,
        agreement=len(variants) > 1,
        evaluate=_evaluator(data, measured.limit, labelled.template),
        command=redact(shlex.join(["zsseg-rt", "profile", *context.meta[WORDS]])),
    )
    reports.write(report)
    _print(report)
    verdicts = [] if gate is None else [one.difference.verdict for one in report.comparisons]
    if "slower" in verdicts or (compared.strict and "undecided" in verdicts):
        return EXIT_GATE
    failed = report.interrupted or any(variant.failure for variant in report.variants)
    return EXIT_FAILURE if failed else EXIT_OK


def _variants(base: Variant, compared: _Compared) -> tuple[Variant, ...]:
    from zsseg_rt.profiling.workload import read_against, read_sweep

    variants = [base, *(read_against(text, base) for text in compared.against or [])]
    if (python := compared.against_python) is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise UsageError(f"--against-python: expected an interpreter, got {python!r}")
        variants.append(replace(base, name=f"python {python}", python=python))
    for text in compared.sweep or []:
        variants += read_sweep(text, base)
    return tuple(variants)


def _run(labelled: _Workload, **settings: Any) -> Report:
    from zsseg_rt.demo import DEFAULT, demo_photos
    from zsseg_rt.profiling.profiler import Profiler, SelfCheckError
    from zsseg_rt.profiling.workload import Workload, read_frames
    from zsseg_rt.stream.uris import source_names

    names: Any = labelled.read_if_given()
    frames = read_frames(labelled.source or demo_photos(labelled.demo or DEFAULT))
    source = ", ".join(source_names(labelled.source)) if labelled.source else "the demo's images"
    with (
        tempfile.TemporaryDirectory(prefix="zsseg-profile-") as folder,
        terminal().status("starting") as status,
    ):
        work = Workload(Path(folder), frames, names, labelled.template)
        try:
            settings |= {"source": source, "on_progress": status.update}
            return Profiler(workload=work, **settings).run()
        except SelfCheckError as exc:
            typer.echo(f"zsseg-rt: {exc}", err=True)
            raise typer.Exit(EXIT_GATE) from exc


def _print(report: Report) -> None:
    """Print what a figure must be quoted with, then what speaks against that, then tables."""
    from zsseg_rt.profiling.page import report_tables, versions

    console = terminal()
    say(versions(report))
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    for variant in report.variants:
        if variant.failure:
            console.print(f"failed: {variant.failure}", style="red", soft_wrap=True, markup=False)
    say("")
    for shown in report_tables(report):
        _print_table(shown)
    say(f"repeat: {report.command}")


def _show(files: list[str]) -> int:
    from zsseg_rt.profiling.report import read_report

    if not files:
        raise UsageError("profile show: expected reports, got none")
    for report in [read_report(Path(file)) for file in files]:
        _print(report)
    return EXIT_OK


def _print_table(shown: TextTable) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=shown.title, title_justify="left")
    table.title_style = "bold"
    numeric = shown.headings[-1] not in ("verdict", "note") and shown.title != "what ran"
    for index, heading in enumerate(shown.headings):
        right = index > 0 and numeric
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*row)
    terminal().print(table, "")


def _share(option: str, text: str) -> float:
    """Read ``5%`` or ``0.05``."""
    try:
        number = text.strip()
        value = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        value = math.nan
    if not 0.0 < value < 10.0:
        raise UsageError(f"{option}: expected a share such as 5% or 0.05, got {text!r}")
    return value


def _evaluator(
    data: DataOptions, limit: int | None, templates: list[str] | None
) -> Callable[[Variant], float | None] | None:
    if not data.dataset:
        return None
    dataset = data.open()

    def evaluate_variant(variant: Variant) -> float | None:
        from zsseg_rt.config import EngineConfig
        from zsseg_rt.engine import Engine
        from zsseg_rt.evaluation import EngineSegmenter, evaluate

        with Engine(variant.bundle, EngineConfig.from_dict(variant.config)) as engine:
            segmenter = EngineSegmenter(engine, dataset.class_names, templates=templates)
            return 100.0 * evaluate(segmenter, dataset, limit=limit).scores.miou

    return evaluate_variant
