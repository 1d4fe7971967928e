"""``zsseg-rt export trained``: from a training run to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zsseg_rt.cli.groups import ModelOutput, takes_groups
from zsseg_rt.cli.options import read_size
from zsseg_rt.common.extras import needs_extra


@takes_groups
def export_trained(
    *,
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    size: Annotated[
        str | None, typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH; default: as trained.")
    ] = None,
    bundle: ModelOutput,
) -> None:
    """Turn the best checkpoint of a training run into a bundle."""
    options: dict[str, Any] = {}
    if size is not None:
        options["size_hw"] = read_size(size)
    if bundle.precision:
        options["precisions"] = tuple(bundle.precision)
    with needs_extra("train", f"to export {run}"):
        from zsseg_rt.training.trained.bundle import export_trained as export

        bundle.write(export, run, **options)
