"""``zsseg-rt calibrate``: choose a run's cosine weights and seen bias without unseen labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsseg_rt.cli.options import JsonOption
from zsseg_rt.cli.output import EXIT_FAILURE, check_file_place, terminal, write_json
from zsseg_rt.extras import needs_extra

if TYPE_CHECKING:
    from zsseg_rt.training.trained.calibration import Calibration, FoldFigures


def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run: ZegCLIP or CLIP-RC.")],
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each brief training; default: a quarter of the run's."),
    ] = None,
    folds: Annotated[
        int, typer.Option(min=1, max=4, help="How often other names are held out.")
    ] = 2,
    images: Annotated[
        int, typer.Option(min=1, help="Training images to choose by; they are not trained on.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the names that are held out.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Choose how much cosines count and the seen bias, by names held out of brief trainings."""
    check_file_place("--json", json_file)
    with needs_extra("train", f"to calibrate {run}"):
        from zsseg_rt.training.calibration.calibrate import CalibrationSettings
        from zsseg_rt.training.calibration.calibrate import calibrate as choose

        settings = CalibrationSettings(
            iterations=iterations or 0, folds=folds, images=images, seed=seed
        )
        found = choose(run, settings, tell=_say)
    if found is None:
        _say("stopped; the same command continues")
        raise typer.Exit(EXIT_FAILURE)
    _print(found, run)
    if json_file is not None:
        write_json(json_file, found)


def print_calibration(run: Path) -> None:
    """Say which chosen settings a run's model is given, if any were chosen."""
    from zsseg_rt.training.trained.calibration import CALIBRATION_FILE, read_calibration

    found = read_calibration(run)
    if found is not None:
        _say(f"{CALIBRATION_FILE}: {found.described}; --cosine 0,0 leaves it out")


def _print(found: Calibration, run: Path) -> None:
    from rich.table import Table

    from zsseg_rt.training.trained.calibration import CALIBRATION_FILE

    table = Table("held out", "before S / U", "hIoU", "after S / U", "hIoU", box=None)
    for hold_out in found.hold_outs:
        figures = [*_cells(hold_out.before), *_cells(hold_out.after)]
        table.add_row(", ".join(hold_out.names), *figures)
    means = (found.mean(chosen=False), found.mean(chosen=True))
    table.add_row("mean", "", f"{means[0]:.2f}", "", f"{means[1]:.2f}")
    terminal().print(table)
    _say(f"chosen on {found.images} training images: {found.described}")
    _say(f"wrote {run / CALIBRATION_FILE}; export trained and evaluate take it from there")


def _cells(figures: FoldFigures) -> tuple[str, str]:
    return f"{figures.seen:.2f} / {figures.unseen:.2f}", f"{figures.harmonic_mean:.2f}"


def _say(line: str) -> None:
    terminal().print(line, highlight=False, soft_wrap=True)
