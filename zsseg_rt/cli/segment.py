"""``zsseg-rt segment``: label the pixels of photos."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsseg_rt.cli.options import (
    AlphaOption,
    BundleOption,
    DemoOption,
    JsonOption,
    WordOptions,
    choose_bundle,
    opt,
    takes_groups,
)
from zsseg_rt.cli.output import (
    ProgressBar,
    UsageError,
    UserInterrupt,
    check_file_place,
    check_folder_place,
    describe_engine,
    print_less,
    say,
    terminal,
    write_json,
)
from zsseg_rt.common.schema import encode, printable
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import MAX_PIXELS

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine
    from zsseg_rt.integrations.batch import PhotoResult
    from zsseg_rt.results.segmentation import Segmentation


_COLUMNS = ("photo", "class", "share", "pixels", "mask", "error")
_NEARLY_ALL = 0.98  # a class with this share of an image is remarked upon


@dataclass(frozen=True, kw_only=True)
class _PhotoOptions:
    """How each photo is labelled and written; the settings of ``batch.segment_photos``."""

    alpha: AlphaOption = 0.5
    overlay_format: str = opt("png, or jpg, which is faster to write.", "png")
    legend: bool = opt("Write class names and a legend on the overlays.", False, "--legend")
    resume: bool = opt("Skip photos that are already done.", False)
    max_pixels: int = opt("Refuse photos with more pixels: one takes 12 bytes.", MAX_PIXELS, min=1)


@dataclass(frozen=True, kw_only=True)
class _Output:
    out: Path = opt("Folder for images.", Path("zsseg_out"), "--out", "-o")
    json_file: JsonOption = None
    output: str = opt(
        "On the terminal: table, json (a line per photo) or csv. In --out: png is the images "
        "alone; coco, geojson and labelme write files beside them.",
        "table",
        "--format",
    )

    def __post_init__(self) -> None:
        if self.output not in PRINTERS:
            raise UsageError(f"--format: expected one of {', '.join(PRINTERS)}, got {self.output}")


@takes_groups
def segment(
    *,
    photos: Annotated[
        list[str] | None, typer.Argument(help="Photos, folders or glob patterns.")
    ] = None,
    bundle: BundleOption = None,
    demo: DemoOption = None,
    words: WordOptions,
    place: _Output,
    run: EngineConfig,
    each: _PhotoOptions,
    lanes: Annotated[
        int, typer.Option(min=0, max=MAX_LANES, help="Photos labelled at once; 0 = automatic.")
    ] = 0,
) -> None:
    """Label every pixel of photos: an overlay, a label image and a table of classes for each.

    --demo alone labels four photos that ship with the package. On photos of your own it looks for
    all that its model was trained to see, or for your --classes.
    """
    from zsseg_rt.demo import DEFAULT, demo_photos
    from zsseg_rt.engine import Engine
    from zsseg_rt.integrations.batch import lanes_for
    from zsseg_rt.photos import OVERLAY_SUFFIXES, find_photos
    from zsseg_rt.stream.writers import VIDEO_SUFFIXES

    if each.overlay_format not in OVERLAY_SUFFIXES:
        raise UsageError(f"--overlay-format: expected png or jpg, got {each.overlay_format!r}")
    print_less(to_stderr=place.output in ("json", "csv"))
    lacking = "name at least one photo, folder or pattern"
    path = choose_bundle(bundle, photos, demo=demo, missing=lacking)
    for word in photos or []:
        if "://" in word or Path(word).suffix.lower() in VIDEO_SUFFIXES:
            raise UsageError(f"photos: expected files, got {word}. Read it with: zsseg-rt stream")
    names = words.read(path, shows=None if photos else demo)
    files = find_photos(photos or demo_photos(demo or DEFAULT))
    check_file_place("--json", place.json_file)
    check_folder_place("--out", place.out)
    config = replace(run, num_lanes=lanes or lanes_for(len(files), run))
    with Engine(path, config) as engine:
        words.give(engine, names)
        _print_if_photographs(engine, photos)
        results = _segment(engine, files, place, each)
        if demo and words.read_if_given() is None:
            _print_words(engine, demo)
        _write_report(place.json_file, engine, results)
    failed = [result for result in results if result.error is not None]
    if failed:
        raise SourceError(f"{len(failed)} of {len(results)} photos failed; see above")


def _segment(
    engine: Engine, photos: Sequence[Path], place: _Output, each: _PhotoOptions
) -> list[PhotoResult]:
    """The results, which are written as far as they go where Ctrl-C interrupts."""
    from zsseg_rt.integrations import batch

    results: list[PhotoResult] = []
    files = None
    if place.output in batch.KINDS and engine.vocabulary is not None:
        files = batch.AnnotationFiles(place.output, place.out, engine.vocabulary.names)
    if place.output == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerow(_COLUMNS)
    bar = ProgressBar("photos", hidden=len(photos) < 2)

    def show(result: PhotoResult, seg: Segmentation | None) -> None:
        results.append(result)
        PRINTERS[place.output](result)
        if files is not None and (path := files.add(result, seg)) is not None:
            say(f"  {path!s}")
        bar.show(len(results), len(photos))

    try:
        with bar:
            batch.segment_photos(engine, photos, place.out, on_done=show, **vars(each))
    except KeyboardInterrupt:
        _write_report(place.json_file, engine, results, interrupted=True)
        done = sum(result.error is None for result in results)
        raise UserInterrupt(
            f"interrupted; {done} of {len(photos)} photos are done. Add --resume to go on from "
            "there."
        ) from None
    finally:
        if files is not None and (path := files.finish()) is not None:
            say(f"  {path!s}")
    return results


def _write_report(
    file: Path | None, engine: Engine, results: Sequence[PhotoResult], *, interrupted: bool = False
) -> None:
    content = {"engine": describe_engine(engine), "photos": results}
    write_json(file, {**content, "interrupted": True} if interrupted else content)


def _print_words(engine: Engine, demo: str) -> None:
    concepts, bank = engine.bundle.concepts, engine.bundle.text_bank
    if concepts is None:
        return
    listed = f"zsseg-rt info demo-{demo} --names"
    more = "" if bank is None else f"; it takes {len(bank.names)} names: {listed}"
    names = ", ".join(concepts.names)
    say(f"Name your own classes with --classes 'a,b'. This model was trained on: {names}{more}")


def print_table(result: PhotoResult) -> None:
    """Print a table of the classes in a photo, and where its images are."""
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    if result.error is not None:
        console.print(f"failed: {result.error}", style="red", highlight=False, soft_wrap=True)
        return
    height, width = result.size_hw or (0, 0)
    total = (result.times or {}).get("total", 0.0)
    state = "done earlier" if result.resumed else f"{total:.0f} ms"
    say(f"{result.photo}  {width}x{height}, {state}")
    table = Table("", "class", "share", "pixels", "colour", box=None, pad_edge=False)
    for entry in result.classes:
        name, colour, share = entry["name"], entry["colour"], f"{entry['share']:.1%}"
        table.add_row(Text("██", style=colour), name, share, str(entry["pixels"]), colour)
    if result.unknown_share:
        table.add_row("", "(unknown)", f"{result.unknown_share:.1%}", "", "")
    console.print(table)
    if remark := _remark_on(result):
        console.print(f"  {remark}", style="yellow", highlight=False, soft_wrap=True)
    for written in (result.overlay, result.mask):
        say(f"  {written or ''}")


def _print_json(result: PhotoResult) -> None:
    sys.stdout.write(json.dumps(encode(result)) + "\n")
    sys.stdout.flush()


def _print_csv(result: PhotoResult) -> None:
    """One row per class; a failed photo has its error last."""
    rows = csv.writer(sys.stdout, lineterminator="\n")
    for entry in result.classes:
        row = [printable(entry["name"]), entry["share"], entry["pixels"], result.mask, ""]
        rows.writerow([result.photo, *row])
    if result.error is not None:
        rows.writerow([result.photo, "", "", "", "", result.error])
    sys.stdout.flush()


PRINTERS: Mapping[str, Callable[[PhotoResult], None]] = {
    "table": print_table,
    "json": _print_json,
    "csv": _print_csv,
    **dict.fromkeys(("png", "coco", "geojson", "labelme"), print_table),
}
"""By the name that ``--format`` takes."""


def _print_if_photographs(engine: Engine, photos: list[str] | None) -> None:
    """Warn that the scenes model knows only drawings, if the photos are others."""
    from zsseg_rt.demo import demo_bundle, demo_photos

    if engine.bundle.path != demo_bundle("scenes") or not photos:
        return
    if set(photos) <= set(demo_photos("scenes")):
        return
    say(
        "The model that ships knows only drawings of a made-up world: its labels of photographs "
        "mean nothing. Take --demo without scenes, or see README, section Your own photos."
    )


def _remark_on(result: PhotoResult) -> str:
    """One line about a photo that one class, or none, has nearly all of; otherwise empty."""
    if result.unknown_share >= _NEARLY_ALL:
        return (
            "remark: nearly every pixel is unknown. Name what is in the photo, or leave out "
            "background phrases (--background none) and --unknown-below."
        )
    if result.classes and result.classes[0]["share"] >= _NEARLY_ALL:
        top = result.classes[0]
        return (
            f"remark: {top['name']!r} takes {top['share']:.1%} of the photo. Every pixel takes "
            "the best of the phrases it is given: name more classes, or what else is in the "
            "photo with --background 'a,b'."
        )
    return ""
