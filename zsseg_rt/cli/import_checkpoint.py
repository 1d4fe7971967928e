"""``zsseg-rt import-checkpoint``: from official checkpoints to bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zsseg_rt.argument_names import arguments_called
from zsseg_rt.cli.options import (
    CheckpointArgument,
    LicenceOption,
    OutOption,
    OverwriteOption,
    PrecisionsOption,
    SeenOption,
    SelfTrainedOption,
    SizeOption,
    TrainingClassesOption,
    TrustOption,
    UsageError,
    flat_names,
    indices_of,
    read_precisions,
    read_size,
)
from zsseg_rt.cli.output import terminal
from zsseg_rt.files import is_file

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
        typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH; default: the official one."),
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


@import_app.command("zegformer")
def import_zegformer(
    checkpoint: CheckpointArgument,
    out: OutOption,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP's weights, which checkpoints lack: OpenAI's ViT-B-16.pt, or a "
            "tag of open_clip such as openai."
        ),
    ] = None,
    classes: TrainingClassesOption = None,
    seen: SeenOption = "",
    prompts: Annotated[
        str, typer.Option(help="Prompts of the text branch: single (VOC), or imagenet_select.")
    ] = "single",
    fusion: Annotated[
        str,
        typer.Option(
            help="Which scores count: segments, CLIP on their regions, or both, weighted by "
            "whether a class is seen (seen_and_unseen) or alike (all_classes)."
        ),
    ] = "seen_and_unseen",
    calibration: Annotated[
        float, typer.Option(help="Subtracted from the scores of seen classes.")
    ] = 0.1,
    region_style: Annotated[
        str, typer.Option(help="Input of CLIP: cropmask, mask or crop.")
    ] = "cropmask",
    size: SizeOption = "512",
    precision: PrecisionsOption = None,
    licence: LicenceOption = "",
    trust: TrustOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn an official ZegFormer checkpoint into a bundle."""
    from zsseg_rt.bundle_specs import FUSIONS

    if fusion not in FUSIONS:
        raise UsageError(f"--fusion: expected one of {', '.join(FUSIONS)}, got {fusion}")
    names = flat_names(classes)
    templates = _zegformer_prompts(prompts)
    space = {} if clip is None else {"space": _describe_space(clip)}
    model = _load_official(
        "zegformer",
        checkpoint,
        trust=trust,
        seen_classes=indices_of(flat_names(seen), names),
        clip=_load_clip(clip, trust=trust),
        calibration=calibration,
        region_style=region_style,
        fusion=fusion,
    )
    _write_bundle(
        model,
        out,
        precision,
        class_names=names or None,
        templates=templates,
        template_set=prompts,
        size_hw=read_size(size),
        source=checkpoint.name,
        licence=licence,
        overwrite=overwrite,
        **space,
    )


def _zegformer_prompts(name: str) -> Sequence[str]:
    from zsseg_rt.models.zegformer.prompts import SEGMENT_TEMPLATES, SINGLE_TEMPLATE

    known = {"single": SINGLE_TEMPLATE, "imagenet_select": SEGMENT_TEMPLATES}
    if name not in known:
        raise UsageError(f"--prompts: expected one of {', '.join(known)}, got {name}")
    return known[name]


def _load_clip(source: str | None, *, trust: bool) -> Any:
    """CLIP's weights from a file or a tag; files without an activation are OpenAI's."""
    if source is None:
        return None
    from zsseg_rt.models import load_clip

    activation: Any = "quick_gelu" if is_file(Path(source)) else None
    with arguments_called({"source": "--clip"}):
        return load_clip(source, activation=activation, trust=trust)


def _describe_space(source: str) -> str:
    from zsseg_rt.models.clip.space import describe_space

    return describe_space(source)


def _load_official(architecture: str, checkpoint: Path, *, trust: bool, **config: Any) -> Any:
    """Build a model from a checkpoint file in its authors' layout."""
    from zsseg_rt.models import from_official, load_checkpoint, normalize_state_dict

    state_dict = normalize_state_dict(load_checkpoint(checkpoint, trust=trust))
    return from_official(architecture, state_dict, **config)


def _write_bundle(model: Any, out: Path, precision: Sequence[str] | None, **options: Any) -> None:
    from zsseg_rt.export import export_bundle

    written = export_bundle(model, out, precisions=read_precisions(precision), **options)
    terminal().print(f"wrote {written}", highlight=False)
