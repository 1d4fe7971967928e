"""What became of a photo, printed for people or for programs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from zsseg_rt.cli.output import say, terminal
from zsseg_rt.cli.remarks import remark_on
from zsseg_rt.common.schema import printable

if TYPE_CHECKING:
    from zsseg_rt.integrations.batch import PhotoResult

_COLUMNS = ("photo", "class", "share", "pixels", "mask", "error")


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
        colour = entry["colour"]
        table.add_row(
            Text("██", style=colour),
            entry["name"],
            f"{entry['share']:.1%}",
            str(entry["pixels"]),
            colour,
        )
    if result.unknown_share:
        table.add_row("", "(unknown)", f"{result.unknown_share:.1%}", "", "")
    console.print(table)
    if remark := remark_on(result):
        console.print(f"  {remark}", style="yellow", highlight=False, soft_wrap=True)
    for written in (result.overlay, result.mask):
        say(f"  {written or ''}")


def _print_json(result: PhotoResult) -> None:
    from zsseg_rt.common.schema import encode

    sys.stdout.write(json.dumps(encode(result)) + "\n")
    sys.stdout.flush()


def print_csv_header() -> None:
    """The names of the columns of ``--format csv``."""
    csv.writer(sys.stdout, lineterminator="\n").writerow(_COLUMNS)


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
