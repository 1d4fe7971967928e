"""``zsseg-rt import-checkpoint``: from official checkpoints to bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zsseg_rt.cli.options import (
    CheckpointArgument,
    LicenceOption,
    OutOption,
    OverwriteOption,
    PrecisionsOption,
    SeenOption,
    SelfTrainedOption,
    TrainingClassesOption,
    TrustOption,
    flat_names,
    indices_of,
    read_size,
)
from zsseg_rt.cli.output import terminal

import_app = typer.Typer(help="Turn an official checkpoint into a bundle.", no_args_is_help=True)


@import_app.command("zegclip")
def import_zegclip(
    checkpoint: CheckpointArgument,
    out: OutOption,
    classes: TrainingClassesOption = None,
    seen: SeenOption = "",
    self_trained: SelfTrainedOption = False,
    precision: PrecisionsOption = None,
    licence: LicenceOption = "",
    trust: TrustOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn an official ZegCLIP checkpoint into a bundle."""
    names = flat_names(classes)
    model = _load_official(
        "zegclip",
        checkpoint,
        trust=trust,
        seen_classes=indices_of(flat_names(seen), names),
        self_trained=self_trained,
    )
    options = {"class_names": names or None, "licence": licence, "overwrite": overwrite}
    _write_bundle(model, out, precision, **options)


@import_app.command("clip_rc")
def import_clip_rc(
    checkpoint: CheckpointArgument,
    out: OutOption,
    classes: TrainingClassesOption = None,
    seen: SeenOption = "",
    self_trained: SelfTrainedOption = False,
    size: Annotated[
        str | None,
        typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH; default the official one."),
    ] = None,
    precision: PrecisionsOption = None,
    licence: LicenceOption = "",
    trust: TrustOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn an official CLIP-RC checkpoint, of PyTorch or Jittor, into a bundle."""
    names = flat_names(classes)
    model = _load_official(
        "clip_rc",
        checkpoint,
        trust=trust,
        seen_classes=indices_of(flat_names(seen), names),
        self_trained=self_trained,
        with_recovery_decoder=False,
    )
    options = {"class_names": names or None, "licence": licence, "overwrite": overwrite}
    _write_bundle(model, out, precision, size_hw=read_size(size) if size else None, **options)


def _load_official(architecture: str, checkpoint: Path, *, trust: bool, **config: Any) -> Any:
    """Build a model from a checkpoint file in its authors' layout."""
    from zsseg_rt.models import from_official, load_checkpoint, normalize_state_dict

    state_dict = normalize_state_dict(load_checkpoint(checkpoint, trust=trust))
    return from_official(architecture, state_dict, **config)


def _write_bundle(model: Any, out: Path, precision: Sequence[str] | None, **options: Any) -> None:
    from zsseg_rt.export import export_bundle

    precisions = tuple(precision or ("float32", "float16"))
    written = export_bundle(model, out, precisions=precisions, **options)
    terminal().print(f"wrote {written}", highlight=False)
