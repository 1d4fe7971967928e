"""``zsseg-rt export``: models become bundles, bundles become models of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zsseg_rt.cli.options import (
    ModelOptions,
    NamedClasses,
    OutOption,
    OwnSizeOption,
    SizeOption,
    Takes,
    TemplateOption,
    TextHeadsOption,
    check_activation,
    opt,
    read_size,
    takes_groups,
    write_bundle,
    write_model,
)
from zsseg_rt.cli.output import UsageError, say, working
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.settings import changed
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import SourceError
from zsseg_rt.export.options import ExportOptions

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}  # mean and std of RGB in 0..1: OpenAI CLIP's and torchvision's
_MAX_BANK_BYTES = 1 << 30  # half a million names of 512 float32


class BundleOrCommand(TyperGroup):
    """Takes ``BUNDLE --triton DIR`` where the name of a command is expected."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name before a bundle's."""
        if not self.commands.keys() & set(args[:1]):
            if any(word.split("=")[0] == "--triton" for word in args):
                args = ["triton", *args]
            elif args and not args[0].startswith("-"):
                raise UsageError(
                    f"expected BUNDLE --triton DIR or one of {', '.join(self.commands)}; "
                    f"got {args[0]!r}. See zsseg-rt export --help."
                )
        return list(super().parse_args(ctx, args))


export_app = typer.Typer(
    help="Export a model to a bundle, or a bundle to Triton: BUNDLE --triton DIR.",
    no_args_is_help=True,
    cls=BundleOrCommand,
)


_ENCODER = Takes(
    "embed_output", "grid_hw", "logit_scale", "activation", "align", "licence", "overwrite"
)


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    size: int = opt("Side of the square input in pixels.", ..., min=1)
    bank: tuple[Path, Path] = opt("Names (one per line, or a JSON list) and rows (.npy).", ...)
    statistics: str = opt("Normalisation: clip, imagenet or none.", "clip", "--mean")


@export_app.command("dense")
@takes_groups
def export_dense(
    *,
    encoder: Annotated[Path, typer.Argument(help="ONNX graph from image to dense embeddings.")],
    source: _Encoder,
    out: OutOption,
    bundle: Annotated[ExportOptions, _ENCODER],
) -> None:
    """Wrap an ONNX encoder whose patches live in a text space, with its text embeddings."""
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.export import export_dense_bundle

    if source.statistics not in STATISTICS:
        raise UsageError(
            f"--mean: expected one of {', '.join(STATISTICS)}, got {source.statistics}"
        )
    mean, std = STATISTICS[source.statistics]
    bank = read_bank(*source.bank)
    settings = {"image_size": source.size, "mean": mean, "std": std, "text_bank": bank}
    written = write_bundle(export_dense_bundle, encoder, out, options=bundle, **settings)
    if bundle.align is None:
        align = Bundle.load(written).head.align
        say(f"cells: taken to lie by {align}, as sizes suggest; if not, use --align")


@dataclass(frozen=True, kw_only=True)
class _DenseClip:
    """CLIP and its head; the fields are arguments of ``create_model``."""

    clip: str = opt("demo, a weights file, or open_clip's name, for --pretrained.", "ViT-B-16")
    pretrained: str | None = opt("open_clip tag such as openai, or a weights file; needs torch.")
    head: str | None = opt(
        "naclip, clearclip, sclip, maskclip, vanilla, sfp or sc_clip; for PE-Core and SigLIP "
        "value_mlp or value; default: naclip or value_mlp."
    )
    logit_scale: float | None = opt("Factor of the cosine; default: the head's.")
    unknown_below: float | None = opt("Probability in [0, 1] below which a pixel is unknown.")
    activation: str | None = opt("quick_gelu or gelu, for a weights file without it.")
    num_heads: int | None = opt("Heads of the image tower, for a weights file.")
    text_heads: TextHeadsOption = None
    position: str = opt("How positions are resized: size or as_published.", "size")
    pm: str | None = opt("How sfp and sc_clip find outliers: l2, som or lof; default: the head's.")
    r: float = opt("Share of the class token that sfp and sc_clip add to patches.", 0.3)
    beta: float = opt("Cosine below which sfp and sc_clip let patches share nothing.", 0.4)
    size: SizeOption = "448"
    template: list[str] | None = opt("Prompt with one {}; may repeat; default: CLIP's 80.")


@export_app.command("dense-clip")
@takes_groups
def export_dense_clip(*, model: _DenseClip, out: OutOption, bundle: ModelOptions) -> None:
    """Export plain CLIP with a training-free dense head, its text tower and its tokenizer.

    --clip demo or --clip FILE needs no torch.
    """
    check_activation("--activation", model.activation)
    if _names_weights(model.clip):
        _export_clip_file(model, out, bundle)
        return
    if model.pretrained is None:
        raise UsageError(
            f"--pretrained: expected a tag such as openai for --clip {model.clip}, got nothing; "
            "or give weights: --clip FILE, --clip demo"
        )
    from zsseg_rt.models import create_model
    from zsseg_rt.torch_files.clip_arrays import describe_space

    settings = vars(model) | {"head": model.head or "naclip"}
    settings["image_size"] = read_size(settings.pop("size"))
    settings["templates"] = settings.pop("template")
    with arguments_called({"source": "--pretrained", "activation": "--activation"}):
        network = create_model("dense_clip", **settings)
    space = describe_space(model.pretrained, model.clip)
    write_model(network, out, bundle, space=space, source=Path(model.pretrained).name)


def _names_weights(clip: str) -> bool:
    """Whether it is weights, not open_clip's name of an architecture."""
    return clip == "demo" or clip.endswith(".safetensors") or Path(clip).is_file()


def _export_clip_file(model: _DenseClip, out: Path, bundle: ExportOptions) -> None:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.export.clip_file import DenseHead, export_clip_file

    if model.pretrained is not None:
        raise UsageError(f"--pretrained: expected nothing beside --clip {model.clip}, a file")
    settings = vars(model).keys() & vars(DenseHead()).keys()
    size_hw, others = read_size(model.size), {"templates": model.template}
    head = DenseHead(size_hw=size_hw, **{name: getattr(model, name) for name in settings})
    with working(f"exporting {model.clip}"):
        written = write_bundle(export_clip_file, model.clip, out, head, options=bundle, **others)
    if model.activation is None and model.clip != "demo":
        activation = Bundle.load(written).provenance["activation"]
        say(f"activation: taken to be {activation}; if it is not, use --activation")


def read_bank(names_file: Path, rows_file: Path) -> tuple[list[str], Any]:
    """Read class names (one per line, or a JSON list) and their embeddings (.npy)."""
    import numpy as np

    from zsseg_rt.common.files import read_npy
    from zsseg_rt.text.name_lists import read_name_list

    try:
        names = read_name_list(names_file, SourceError, with_ids=True)
        rows = read_npy(rows_file.read_bytes(), what=str(rows_file), max_bytes=_MAX_BANK_BYTES)
        return list(names.names), names.pick(rows.astype(np.float32))
    except SourceError:
        raise
    except (OSError, ValueError) as exc:
        raise SourceError(f"--bank: cannot be read: {exc}") from exc


@export_app.command("trained")
@takes_groups
def export_trained(
    *,
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    size: OwnSizeOption = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Turn the best checkpoint of a training run into a bundle."""
    size_hw = {} if size is None else {"size_hw": read_size(size)}
    with needs_extra("train", f"to export {run}"):
        from zsseg_rt.training.trained import export_trained as export

        write_bundle(export, run, out, options=bundle, **size_hw)


@dataclass(frozen=True, kw_only=True)
class _Student:
    """How a student scores, and whose text embeddings it learned from; as ``create_model`` does."""

    pretrained: str | None = opt("The teacher's text tower: a tag, or a file.", None, "--text")
    clip: str = opt("open_clip's name of the teacher, for a tag.", "ViT-L-14")
    bank: tuple[Path, Path] | None = opt("Names (text or JSON) and the teacher's rows (.npy).")
    activation: str | None = opt(
        "quick_gelu or gelu, for a text weights file without it.", None, "--text-activation"
    )
    text_heads: TextHeadsOption = None
    logit_scale: float = opt("Factor of the cosine.", 100.0)
    top_k: int = opt("Keep only this many classes nearest to the frame; 0 = all.", 5, min=0)
    background_threshold: float | None = opt(
        "Background threshold in [0, 1]; paper: VOC 0.95, COCO 0.35.", None, "--unknown-below"
    )
    num_heads: int | None = opt("Heads of the encoder; default: one per 64 channels.")
    head_heads: int | None = opt("Heads of the segmentation head; default as for the encoder.")
    size: SizeOption = "448"
    template: TemplateOption = None


@export_app.command("zeroseg")
@takes_groups
def export_zeroseg(
    *,
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of zsseg_rt's training (.safetensors).")
    ],
    student: _Student,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Export a trained ZeroSeg student, with its teacher's text tower or a text bank."""
    from zsseg_rt.models import create_model
    from zsseg_rt.torch_files.clip_arrays import describe_rows, describe_space

    check_activation("--text-activation", student.activation)
    settings = {name: value for name, value in vars(student).items() if value is not None}
    settings |= {"image_size": read_size(settings.pop("size")), "top_k": student.top_k or None}
    others = {"templates": settings.pop("template", None), "source": checkpoint.name}
    if bank := settings.pop("bank", None):
        others |= {"text_bank": read_bank(*bank), "space": describe_rows(bank[1])}
    if student.pretrained:
        others["space"] = describe_space(student.pretrained, student.clip)
    with arguments_called({"source": "--text", "activation": "--text-activation"}):
        model = create_model("zeroseg", weights=checkpoint, with_decoder=False, **settings)
    write_model(model, out, bundle, **others)


_ENGINE = Takes("backend", "precision", "unknown_below", "num_threads")  # on Triton's device


@export_app.command("triton")
@takes_groups
def export_triton(
    *,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder NAME.zsseg.")],
    repository: Annotated[
        Path, typer.Option("--triton", "--out", "-o", help="Triton's model repository.")
    ],
    name: Annotated[
        str | None, typer.Option(help="The model's name; default: the bundle's.")
    ] = None,
    words: NamedClasses,
    engine: Annotated[EngineConfig, _ENGINE],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing model.")] = False,
) -> None:
    """Write a bundle as a model for Triton: zsseg-rt export BUNDLE --triton DIR.

    Requests name the classes; --classes are for those that name none.
    """
    from zsseg_rt.integrations.triton import write_triton_model

    names, config = words.read_if_given() or (), changed(engine)
    with arguments_called({"name": "--name"}):
        written = write_triton_model(
            bundle, repository, name=name, classes=names, engine=config, overwrite=overwrite
        )
    say(f"wrote {written}")
    say(f"run: tritonserver --model-repository={repository}")
