"""``zsseg-rt segment``: label the pixels of photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    AlphaOption,
    BackendOption,
    BackgroundOption,
    BundleOption,
    ClassesOption,
    ClassOption,
    CosineOption,
    DeviceOption,
    JsonOption,
    MinRegionScoreOption,
    PrecisionOption,
    TemplateOption,
    ThreadsOption,
    UnknownBelowOption,
    UsageError,
    read_background,
    read_classes_or_demo,
    read_cosine,
)
from zsseg_rt.cli.output import (
    UserInterrupt,
    check_file_place,
    check_folder_place,
    describe_engine,
    print_less,
    terminal,
    write_json,
)
from zsseg_rt.cli.photo_tables import PRINTERS
from zsseg_rt.cli.remarks import print_background, print_if_photographs
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.errors import SourceError
from zsseg_rt.picture_header import MAX_PIXELS

if TYPE_CHECKING:
    from zsseg_rt.batch import PhotoResult
    from zsseg_rt.engine import Engine


def segment(
    photos: Annotated[
        list[str] | None, typer.Argument(help="Photos, folders or glob patterns.")
    ] = None,
    bundle: BundleOption = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="Use the bundle, images and classes that ship with the package."
        ),
    ] = False,
    classes: ClassesOption = None,
    class_name: ClassOption = None,
    background: BackgroundOption = "",
    template: TemplateOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images.")] = Path(
        "zsseg_out"
    ),
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    unknown_below: UnknownBelowOption = None,
    min_region_score: MinRegionScoreOption = None,
    cosine: CosineOption = None,
    alpha: AlphaOption = 0.5,
    overlay_format: Annotated[
        str, typer.Option(help="png, or jpg, which is faster to write.")
    ] = "png",
    legend: Annotated[
        bool, typer.Option("--legend", help="Write class names and a legend on the overlays.")
    ] = False,
    lanes: Annotated[
        int, typer.Option(min=0, max=MAX_LANES, help="Photos labelled at once; 0 = automatic.")
    ] = 0,
    resume: Annotated[bool, typer.Option(help="Skip photos that are already done.")] = False,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1, help="Refuse photos with more pixels; labelling takes 12 bytes per pixel."
        ),
    ] = MAX_PIXELS,
    json_file: JsonOption = None,
    output: Annotated[
        str,
        typer.Option("--format", help="On the terminal: table, json (a line per photo) or csv."),
    ] = "table",
) -> None:
    """Label every pixel of photos: an overlay, a label image and a table of classes for each.

    --demo alone labels four images that ship with the package; you may give it other --classes,
    made of the words it lists.
    """
    from zsseg_rt.batch import lanes_for
    from zsseg_rt.engine import Engine
    from zsseg_rt.photos import OVERLAY_SUFFIXES, find_photos

    if overlay_format not in OVERLAY_SUFFIXES:
        raise UsageError(f"--overlay-format: expected png or jpg, got {overlay_format!r}")
    if output not in PRINTERS:
        raise UsageError(f"--format: expected one of {', '.join(PRINTERS)}, got {output!r}")
    print_less(to_stderr=output != "table")
    given = photos
    bundle, photos = _choose_inputs(bundle, photos, demo=demo)
    names = read_classes_or_demo(classes, class_name or [], demo=demo)
    found = find_photos(photos)
    check_file_place("--json", json_file)
    check_folder_place("--out", out)
    config = EngineConfig(
        device=device,
        backend=backend,
        precision=precision,
        num_threads=threads,
        unknown_below=unknown_below,
        min_region_score=min_region_score,
        **read_cosine(cosine),
    )
    config = replace(config, num_lanes=lanes or lanes_for(len(found), config))
    with Engine(bundle, config) as engine:
        chosen = read_background(background, len(names))
        engine.set_classes(names, background=chosen, templates=template)
        print_background(engine, background)
        print_if_photographs(engine, given)
        results: list[PhotoResult] = []
        try:
            _segment_with_progress(
                engine,
                found,
                out,
                results,
                PRINTERS[output],
                alpha=alpha,
                overlay_format=overlay_format,
                legend=legend,
                resume=resume,
                max_pixels=max_pixels,
            )
        except KeyboardInterrupt:
            _write_report(json_file, engine, results, interrupted=True)
            raise UserInterrupt(_what_is_done(results, len(found))) from None
        if demo:
            _print_words(engine)
        _write_report(json_file, engine, results)
    failed = [result for result in results if result.error is not None]
    if failed:
        raise SourceError(f"{len(failed)} of {len(results)} photos failed; see above")


def _choose_inputs(
    bundle: Path | None, photos: list[str] | None, *, demo: bool
) -> tuple[Path, list[str]]:
    """The bundle and the photos to use; ``--demo`` brings its own where none are given.

    Raises:
        UsageError: Something is missing.
    """
    if demo:
        from zsseg_rt.demo import demo_bundle, demo_photos

        return bundle or demo_bundle(), photos or demo_photos()
    if not photos:
        raise UsageError("name at least one photo, folder or pattern; or try --demo")
    if bundle is None:
        raise UsageError(
            "name a bundle: --bundle NAME.zsseg (zsseg-rt fetch gets one); or try --demo"
        )
    return bundle, photos


def _write_report(
    file: Path | None, engine: Engine, results: Sequence[PhotoResult], *, interrupted: bool = False
) -> None:
    if file is not None:
        content = {"engine": describe_engine(engine), "photos": results}
        write_json(file, {**content, "interrupted": True} if interrupted else content)


def _what_is_done(results: Sequence[PhotoResult], total: int) -> str:
    done = sum(result.error is None for result in results)
    return f"interrupted; {done} of {total} photos are done. Add --resume to go on from there."


def _print_words(engine: Engine) -> None:
    words = engine.bundle.text.words
    if words:
        terminal().print(
            f"Name your own classes with --classes 'a,b', using these words: {', '.join(words)}",
            highlight=False,
            soft_wrap=True,
        )


def _segment_with_progress(
    engine: Engine,
    photos: Sequence[Path],
    out: Path,
    results: list[PhotoResult],
    show_result: Callable[[PhotoResult], None],
    **settings: Any,
) -> None:
    """Segment photos; results are appended as they come, so an interrupted run has some."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from zsseg_rt import batch

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal(), disable=len(photos) < 2, transient=True) as bar:
        task = bar.add_task("photos", total=len(photos))

        def show(result: PhotoResult, _: Any) -> None:
            results.append(result)
            show_result(result)
            bar.advance(task)

        batch.segment_photos(engine, photos, out, on_done=show, **settings)
