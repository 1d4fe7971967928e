"""``zsseg-rt export trained``: from a training run to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zsseg_rt.cli.groups import ModelOptions, takes_groups, write_bundle
from zsseg_rt.cli.options import OutOption, read_size
from zsseg_rt.common.extras import needs_extra


@takes_groups
def export_trained(
    *,
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    size: Annotated[
        str | None, typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH; default: as trained.")
    ] = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Turn the best checkpoint of a training run into a bundle."""
    size_hw = {} if size is None else {"size_hw": read_size(size)}
    with needs_extra("train", f"to export {run}"):
        from zsseg_rt.training.trained.card import export_trained as export

        write_bundle(export, run, out, options=bundle, **size_hw)
