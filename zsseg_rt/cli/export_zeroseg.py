"""``zsseg-rt export zeroseg``: a trained student becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zsseg_rt.argument_names import arguments_called
from zsseg_rt.cli.export import read_bank
from zsseg_rt.cli.options import (
    LicenceOption,
    OutOption,
    OverwriteOption,
    PrecisionsOption,
    SizeOption,
    TemplateOption,
    TextHeadsOption,
    TrustOption,
    check_activation,
    read_precisions,
    read_size,
)
from zsseg_rt.cli.output import terminal


def export_zeroseg(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of zsseg_rt's training (.safetensors).")
    ],
    out: OutOption,
    text: Annotated[
        str | None,
        typer.Option(help="The teacher's text tower: open_clip tag such as openai, or a file."),
    ] = None,
    clip: Annotated[
        str, typer.Option(help="open_clip's name of the teacher, for a tag.")
    ] = "ViT-L-14",
    bank: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Class names (one per line, or JSON list) and the teacher's rows (.npy)."
        ),
    ] = None,
    size: SizeOption = "448",
    logit_scale: Annotated[float, typer.Option(help="Factor of the cosine.")] = 100.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Keep only this many classes nearest to the frame; 0 = all.")
    ] = 5,
    plain_cosine: Annotated[
        bool, typer.Option(help="Score by the plain softmax, without GroupViT's rule.")
    ] = False,
    unknown_below: Annotated[
        float | None,
        typer.Option(help="Background threshold in [0, 1]; paper: VOC 0.95, COCO 0.35."),
    ] = None,
    template: TemplateOption = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Heads of the encoder; default: one per 64 channels.")
    ] = None,
    head_heads: Annotated[
        int | None, typer.Option(help="Heads of the segmentation head; default as for the encoder.")
    ] = None,
    text_activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for a text weights file without it.")
    ] = None,
    text_heads: TextHeadsOption = None,
    precision: PrecisionsOption = None,
    licence: LicenceOption = "",
    trust: TrustOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Export a trained ZeroSeg student, with its teacher's text tower or a text bank."""
    from zsseg_rt.export import export_bundle
    from zsseg_rt.models import create_model
    from zsseg_rt.models.clip.space import describe_rows, describe_space

    check_activation("--text-activation", text_activation)
    heads = {"num_heads": num_heads, "head_heads": head_heads}
    with arguments_called({"source": "--text", "activation": "--text-activation"}):
        model = create_model(
            "zeroseg",
            weights=checkpoint,
            pretrained=text,
            clip=clip,
            image_size=read_size(size),
            logit_scale=logit_scale,
            top_k=top_k or None,
            plain_cosine=plain_cosine,
            background_threshold=unknown_below,
            with_decoder=False,
            activation=text_activation,
            text_heads=text_heads,
            trust=trust,
            **{name: count for name, count in heads.items() if count is not None},
        )
    written = export_bundle(
        model,
        out,
        precisions=read_precisions(precision),
        templates=template,
        text_bank=None if bank is None else read_bank(*bank),
        space=describe_space(text, clip) if text else describe_rows(bank[1]) if bank else "",
        source=checkpoint.name,
        licence=licence,
        overwrite=overwrite,
    )
    terminal().print(f"wrote {written}", highlight=False)
