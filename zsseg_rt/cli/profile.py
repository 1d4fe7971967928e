"""``zsseg-rt profile``: where the time goes, and which of two is faster."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    BackendOption,
    ClassesOption,
    ClassOption,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    TemplateOption,
    ThreadsOption,
    UsageError,
    read_classes,
)
from zsseg_rt.cli.output import (
    EXIT_FAILURE,
    EXIT_GATE,
    EXIT_OK,
    check_file_place,
    terminal,
    write_json,
)
from zsseg_rt.extras import install_command

if TYPE_CHECKING:
    from zsseg_rt.evaluation.datasets.base import SegmentationDataset
    from zsseg_rt.profiling.pages.tables import TextTable
    from zsseg_rt.profiling.report import Report
    from zsseg_rt.profiling.variants import Variant

SHOW = "show"


def profile(
    context: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="BUNDLE", help="Bundle NAME.zsseg; or: show A.json [B.json]."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Use the bundle and images that ship with the package.")
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Photos, a folder or a video; may repeat. Default: the demo's images."),
    ] = None,
    classes: ClassesOption = None,
    class_name: ClassOption = None,
    template: TemplateOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another bundle, or changed settings KEY=VALUE,...; may repeat."),
    ] = None,
    against_python: Annotated[
        str | None, typer.Option(help="Interpreter whose zsseg_rt is compared with this one.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="KEY=V,V: classes, threads, precision, backend, streams, frame=WxH."),
    ] = None,
    threshold: Annotated[str, typer.Option(help="Changes up to this count as equal.")] = "2%",
    fail_above: Annotated[
        str | None,
        typer.Option(help="Exit with 3 if a variant is slower by more than this, such as 5%."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --fail-above: also exit with 3 if undecided.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(help="Also label frames that fall due at this rate per second.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Also evaluate on a data set; an unknown name lists all.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "val",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many of its images.")
    ] = None,
    max_duration: Annotated[
        float, typer.Option(help="Seconds after which no further round begins.")
    ] = 30.0,
    cold_start: Annotated[bool, typer.Option(help="Also time fresh processes.")] = True,
    nodes: Annotated[bool, typer.Option(help="Also time the nodes of the graphs.")] = True,
    nvtx: Annotated[
        bool, typer.Option("--nvtx", help="Mark frames and stages for Nsight Systems.")
    ] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    html: Annotated[Path | None, typer.Option(help="Write an HTML report.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of two frames, for Perfetto.")
    ] = None,
    json_file: JsonOption = None,
) -> int:
    """Time a bundle's frames, stages and start; compare it with other bundles and settings.

    docs/profiling.md explains the columns and the verdicts.
    """
    if targets and targets[0] == SHOW:
        return _show(targets[1:])
    from zsseg_rt.profiling.variants import Variant

    _check_numbers(rate=rate, max_duration=max_duration)
    gate = None if fail_above is None else _share("--fail-above", fail_above)
    if strict and gate is None:
        raise UsageError("--strict: expected --fail-above with it, got none")
    if gate is not None and not (against or against_python):
        raise UsageError("--fail-above: expected --against or --against-python with it, got none")
    _check_places({"--json": json_file, "--html": html, "--trace": trace})
    if html is not None:
        _require_package("matplotlib", "--html", extra="report")
    if nvtx:
        _require_package("nvtx", "--nvtx", extra="nvtx")
    bundle = _choose_bundle(targets or [], demo=demo)
    asked = {"device": device, "backend": backend, "precision": precision, "num_threads": threads}
    defaults = {"device": "auto", "backend": "auto", "precision": "auto", "num_threads": 0}
    config = {key: value for key, value in asked.items() if value != defaults[key]}
    config |= {"with_nvtx": True} if nvtx else {}
    base = Variant(name=bundle.name, bundle=bundle, config=config)
    variants = _variants(base, against or [], against_python, sweep or [])
    named = classes is not None or class_name
    names = read_classes(classes, class_name or []) if named else None
    settings: dict[str, Any] = {
        "threshold": _share("--threshold", threshold) if gate is None else gate,
        "max_seconds": max_duration,
        "rate": rate,
        "cold_starts": cold_start,
        "nodes": nodes,
        "agreement": len(variants) > 1,
        "evaluate": None if dataset is None else _evaluator(dataset, root, split, limit, template),
        "command": _repeat(context),
    }
    report = _run(variants, source, names, template, settings)
    _write(report, json_file, html, trace)
    return _exit_code(report, gate, strict=strict)


def _choose_bundle(targets: list[str], *, demo: bool) -> Path:
    if len(targets) > 1:
        raise UsageError(f"expected one bundle, got {', '.join(targets)}; use --against for others")
    if targets:
        from zsseg_rt.pretrained import find_bundle

        return find_bundle(targets[0])
    if not demo:
        raise UsageError("name a bundle: zsseg-rt profile NAME.zsseg; or try --demo")
    from zsseg_rt.demo import demo_bundle

    return demo_bundle()


def _variants(
    base: Variant, against: Sequence[str], python: str | None, sweeps: Sequence[str]
) -> tuple[Variant, ...]:
    from dataclasses import replace

    from zsseg_rt.profiling.variants import read_against, read_sweep

    variants = [base, *(read_against(text, base) for text in against)]
    if python is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise UsageError(f"--against-python: expected an interpreter, got {python!r}")
        variants.append(replace(base, name=f"python {python}", python=python))
    for text in sweeps:
        variants += read_sweep(text, base)
    return tuple(variants)


def _run(
    variants: tuple[Variant, ...],
    source: list[str] | None,
    names: Any,
    templates: Sequence[str] | None,
    settings: dict[str, Any],
) -> Report:
    from zsseg_rt.demo import demo_photos
    from zsseg_rt.profiling.measured import Request
    from zsseg_rt.profiling.profiler import SelfCheckError
    from zsseg_rt.profiling.profiler import profile as run
    from zsseg_rt.profiling.workload import Workload, read_frames
    from zsseg_rt.stream.uris import source_names

    frames = read_frames(source or demo_photos())
    shown = ", ".join(source_names(source)) if source else "the demo's images"
    with tempfile.TemporaryDirectory(prefix="zsseg-profile-") as folder, _status() as tell:
        workload = Workload(Path(folder), frames, names, templates)
        request = Request(
            variants=variants, workload=workload, source=shown, on_progress=tell, **settings
        )
        try:
            return run(request)
        except SelfCheckError as exc:
            typer.echo(f"zsseg-rt: {exc}", err=True)
            raise typer.Exit(EXIT_GATE) from exc


def _write(report: Report, json_file: Path | None, html: Path | None, trace: Path | None) -> None:
    """Files first: whoever reads the tables may stop reading."""
    if json_file is not None:
        write_json(json_file, report)
    if trace is not None:
        from zsseg_rt.profiling.pages.trace import make_trace

        write_json(trace, make_trace(report))
    if html is not None:
        from zsseg_rt.profiling.pages.html import write_html

        write_html(html, report)
    _print(report)


def _print(report: Report) -> None:
    from zsseg_rt.profiling.pages.tables import report_tables

    _print_tables(report_tables(report))
    console = terminal()
    for variant in report.variants:
        if variant.failure:
            console.print(f"failed: {variant.failure}", style="red", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"\nrepeat: {report.command}", highlight=False, soft_wrap=True)


def _exit_code(report: Report, gate: float | None, *, strict: bool) -> int:
    if gate is not None:
        verdicts = [comparison.difference.verdict for comparison in report.comparisons]
        if "slower" in verdicts or (strict and "undecided" in verdicts):
            return EXIT_GATE
    failed = report.interrupted or any(variant.failure for variant in report.variants)
    return EXIT_FAILURE if failed else EXIT_OK


def _show(files: list[str]) -> int:
    from zsseg_rt.profiling.pages.tables import report_tables, side_by_side
    from zsseg_rt.profiling.report import read_report

    if not 1 <= len(files) <= 2:
        raise UsageError(f"profile show: expected one or two reports, got {len(files)}")
    reports = [read_report(Path(file)) for file in files]
    if len(reports) == 1:
        _print_tables(report_tables(reports[0]))
        return EXIT_OK
    first, second = reports
    _print_tables(side_by_side(first, second))
    for text in _differences(first, second):
        terminal().print(f"note: {text}", highlight=False, soft_wrap=True)
    terminal().print("A and B took no turns, so nothing is judged; use --against.", soft_wrap=True)
    return EXIT_OK


def _differences(first: Report, second: Report) -> Iterator[str]:
    """In what two reports did not do the same work."""
    for one in first.variants:
        for other in second.variants:
            if one.name != other.name:
                continue
            for key in ("bundle", "frame", "classes", "streams", "described"):
                here, there = getattr(one, key), getattr(other, key)
                if here != there:
                    yield f"{one.name}: {key} differs: {here} in A, {there} in B"
    if first.source != second.source:
        yield f"sources differ: {first.source} in A, {second.source} in B"


def _print_tables(tables: Sequence[TextTable]) -> None:
    from rich.table import Table

    console = terminal()
    for shown in tables:
        table = Table(box=None, pad_edge=False, title=shown.title, title_justify="left")
        table.title_style = "bold"
        numeric = shown.headings[1:] != ("verdict",) and shown.headings[-1] != "note"
        for index, heading in enumerate(shown.headings):
            right = index > 0 and numeric
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for row in shown.rows:
            table.add_row(*row)
        console.print(table)
        console.print()


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    with terminal().status("starting") as status:
        yield status.update


def _check_numbers(*, rate: float | None, max_duration: float) -> None:
    for name, value in (("--rate", rate), ("--max-duration", max_duration)):
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise UsageError(f"{name}: expected a number above 0, got {value:g}")


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


def _check_places(files: Mapping[str, Path | None]) -> None:
    """Refuse files that cannot all be written, before anything is measured."""
    taken: dict[Path, str] = {}
    for option, file in files.items():
        check_file_place(option, file)
        if file is None:
            continue
        other = taken.setdefault(file.resolve(), option)
        if other != option:
            raise UsageError(f"{option}: expected another file than {other}'s, got {file}")


def _require_package(name: str, option: str, *, extra: str) -> None:
    from importlib.util import find_spec

    from zsseg_rt.errors import BackendUnavailableError

    if find_spec(name) is None:
        raise BackendUnavailableError(
            f"{name}: expected to be installed for {option}, got nothing. "
            f"Run: {install_command(extra)}"
        )


def _repeat(context: typer.Context) -> str:
    """The command line that does this again; without passwords."""
    from zsseg_rt.stream.uris import source_names

    words = ["zsseg-rt", "profile"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value in (None, [], ()) or value == parameter.default:
            continue
        if parameter.param_type_name == "argument":
            words += [str(part) for part in value]
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            parts = [str(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
            for part in source_names(parts) if parameter.name == "source" else parts:
                words += [parameter.opts[0], part]
    return shlex.join(words)


def _evaluator(
    dataset: str, root: Path | None, split: str, limit: int | None, templates: list[str] | None
) -> Callable[[Variant], float | None]:
    from zsseg_rt.cli.evaluate import open_dataset

    data: SegmentationDataset = open_dataset(dataset, root, split, {})

    def evaluate_variant(variant: Variant) -> float | None:
        from zsseg_rt.config import EngineConfig
        from zsseg_rt.engine import Engine
        from zsseg_rt.evaluation.engine_segmenter import EngineSegmenter
        from zsseg_rt.evaluation.evaluate import evaluate

        config = EngineConfig.from_dict(variant.config)
        with Engine(variant.bundle, config) as engine:
            segmenter = EngineSegmenter(engine, data.class_names, templates=templates)
            scores = evaluate(segmenter, data, limit=limit).scores
        return 100.0 * scores.miou

    return evaluate_variant
