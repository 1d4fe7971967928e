"""``zsseg-rt export zeroseg``: a trained student becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from zsseg_rt.cli.export import read_bank
from zsseg_rt.cli.groups import ModelOptions, opt, takes_groups, write_model
from zsseg_rt.cli.options import (
    OutOption,
    SizeOption,
    TemplateOption,
    TextHeadsOption,
    check_activation,
    read_size,
)
from zsseg_rt.common.checks import arguments_called


@dataclass(frozen=True, kw_only=True)
class _Student:
    """How a student scores, and whose text embeddings it learned from."""

    text: str | None = opt("The teacher's text tower: open_clip tag such as openai, or a file.")
    clip: str = opt("open_clip's name of the teacher, for a tag.", "ViT-L-14")
    bank: tuple[Path, Path] | None = opt(
        "Class names (one per line, or JSON list) and the teacher's rows (.npy)."
    )
    text_activation: str | None = opt("quick_gelu or gelu, for a text weights file without it.")
    text_heads: TextHeadsOption = None
    logit_scale: float = opt("Factor of the cosine.", 100.0)
    top_k: int = opt("Keep only this many classes nearest to the frame; 0 = all.", 5, min=0)
    plain_cosine: bool = opt("Score by the plain softmax, without GroupViT's rule.", False)
    unknown_below: float | None = opt("Background threshold in [0, 1]; paper: VOC 0.95, COCO 0.35.")
    num_heads: int | None = opt("Heads of the encoder; default: one per 64 channels.")
    head_heads: int | None = opt("Heads of the segmentation head; default as for the encoder.")

    def space(self) -> str:
        """What its text space is called."""
        from zsseg_rt.torch_files.clip_space import describe_rows, describe_space

        if self.text:
            return describe_space(self.text, self.clip)
        return describe_rows(self.bank[1]) if self.bank else ""


@takes_groups
def export_zeroseg(
    *,
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of zsseg_rt's training (.safetensors).")
    ],
    student: _Student,
    size: SizeOption = "448",
    template: TemplateOption = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Export a trained ZeroSeg student, with its teacher's text tower or a text bank."""
    from zsseg_rt.models import create_model

    check_activation("--text-activation", student.text_activation)
    heads = {"num_heads": student.num_heads, "head_heads": student.head_heads}
    with arguments_called({"source": "--text", "activation": "--text-activation"}):
        model = create_model(
            "zeroseg",
            weights=checkpoint,
            pretrained=student.text,
            clip=student.clip,
            image_size=read_size(size),
            logit_scale=student.logit_scale,
            top_k=student.top_k or None,
            plain_cosine=student.plain_cosine,
            background_threshold=student.unknown_below,
            with_decoder=False,
            activation=student.text_activation,
            text_heads=student.text_heads,
            **{name: count for name, count in heads.items() if count is not None},
        )
    write_model(
        model,
        out,
        bundle,
        templates=template,
        text_bank=None if student.bank is None else read_bank(*student.bank),
        space=student.space(),
        source=checkpoint.name,
    )
