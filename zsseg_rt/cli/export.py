"""``zsseg-rt export``, ``quantize`` and ``build``: bundles, Triton, 8 bits, TensorRT plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.evaluate import DataOptions
from zsseg_rt.cli.export_triton import BundleOrCommand
from zsseg_rt.cli.groups import (
    ModelOptions,
    NamedClasses,
    Takes,
    opt,
    takes_groups,
    write_bundle,
    write_model,
)
from zsseg_rt.cli.options import (
    JsonOption,
    OutOption,
    OverwriteOption,
    SizeOption,
    TextHeadsOption,
    UsageError,
    check_activation,
    read_size,
)
from zsseg_rt.cli.output import (
    EXIT_GATE,
    ProgressBar,
    UserInterrupt,
    check_file_place,
    say,
    write_json,
)
from zsseg_rt.cli.service import stopped_by_signals
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import PRECISIONS
from zsseg_rt.errors import SourceError
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.text.class_names import split_synonyms

if TYPE_CHECKING:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.evaluation.datasets.base import SegmentationDataset
    from zsseg_rt.export.quantized.report import QuantizeReport
    from zsseg_rt.runtime.plan_builds import BuiltPlan

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}  # mean and std of RGB in 0..1: OpenAI CLIP's and torchvision's
_MAX_BANK_BYTES = 1 << 30  # half a million names of 512 float32

export_app = typer.Typer(
    help="Export a model to a bundle, or a bundle to Triton: BUNDLE --triton DIR.",
    no_args_is_help=True,
    cls=BundleOrCommand,
)


_ENCODER = Takes(
    "embed_output", "grid_hw", "logit_scale", "activation", "align", "licence", "overwrite"
)


@export_app.command("dense")
@takes_groups
def export_dense(
    *,
    encoder: Annotated[Path, typer.Argument(help="ONNX graph from image to dense embeddings.")],
    size: Annotated[int, typer.Option(min=1, help="Side of the square input in pixels.")],
    bank: Annotated[
        tuple[Path, Path],
        typer.Option(help="Names (one per line, or a JSON list) and rows (.npy)."),
    ],
    statistics: Annotated[
        str, typer.Option("--mean", help="Normalisation: clip, imagenet or none.")
    ] = "clip",
    out: OutOption,
    bundle: Annotated[ExportOptions, _ENCODER],
) -> None:
    """Wrap an ONNX encoder whose patches live in a text space, with its text embeddings."""
    from zsseg_rt.export import export_dense_bundle

    if statistics not in STATISTICS:
        raise UsageError(f"--mean: expected one of {', '.join(STATISTICS)}, got {statistics}")
    mean, std = STATISTICS[statistics]
    settings = {"image_size": size, "mean": mean, "std": std, "text_bank": read_bank(*bank)}
    written = write_bundle(export_dense_bundle, encoder, out, options=bundle, **settings)
    if bundle.align is None:
        print_guessed_align(written)


def print_guessed_align(bundle: Path) -> None:
    """Say where cells were taken to lie, and why."""
    from zsseg_rt.bundles.bundle import Bundle

    written = Bundle.load(bundle)
    grid, other = written.head.grid_hw, {"corners": "half_pixel", "half_pixel": "corners"}
    say(
        f"cells: taken to lie by {written.head.align}, from {grid[0]}x{grid[1]} cells in "
        f"{written.preprocess.size_hw[0]}x{written.preprocess.size_hw[1]} pixels; if they do not, "
        f"use --align {other[written.head.align]}"
    )


@dataclass(frozen=True, kw_only=True)
class _DenseClip:
    """CLIP and its head; the fields are arguments of ``create_model``."""

    clip: str = opt(
        "demo, a weights file of CLIP, PE-Core or SigLIP, or open_clip's name of the ViT, for "
        "--pretrained.",
        "ViT-B-16",
    )
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


@export_app.command("dense-clip")
@takes_groups
def export_dense_clip(
    *,
    model: _DenseClip,
    size: SizeOption = "448",
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with one {}; may repeat; default: CLIP's 80.")
    ] = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Export plain CLIP with a training-free dense head, its text tower and its tokenizer.

    --clip demo or --clip FILE needs no torch.
    """
    check_activation("--activation", model.activation)
    if _names_weights(model.clip):
        _export_clip_file(model, read_size(size), out, bundle, template)
        return
    if model.pretrained is None:
        raise UsageError(
            f"--pretrained: expected a tag such as openai for --clip {model.clip}, got nothing; "
            "or give weights: --clip FILE, --clip demo"
        )
    from zsseg_rt.models import create_model
    from zsseg_rt.torch_files.clip_space import describe_space

    head = model.head or "naclip"
    settings = {**vars(model), "head": head, "image_size": read_size(size), "templates": template}
    with arguments_called({"source": "--pretrained", "activation": "--activation"}):
        made = create_model("dense_clip", **settings)
    space = describe_space(model.pretrained, model.clip)
    write_model(made, out, bundle, space=space, source=Path(model.pretrained).name)


def _names_weights(clip: str) -> bool:
    """Whether it is weights, not open_clip's name of an architecture."""
    return clip == "demo" or clip.endswith(".safetensors") or Path(clip).is_file()


def _export_clip_file(
    model: _DenseClip,
    size_hw: tuple[int, int],
    out: Path,
    bundle: ExportOptions,
    template: list[str] | None,
) -> None:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.export.clip_file import ACTIVATIONS, DenseHead, export_clip_file

    if model.pretrained is not None:
        raise UsageError(f"--pretrained: expected nothing beside --clip {model.clip}, a file")
    settings = vars(model).keys() & vars(DenseHead()).keys()
    head = DenseHead(size_hw=size_hw, **{name: getattr(model, name) for name in settings})
    with ProgressBar() as bar:
        export = partial(export_clip_file, on_progress=bar.show)
        written = write_bundle(export, model.clip, out, head, options=bundle, templates=template)
    if model.activation is None and model.clip != "demo":
        taken = Bundle.load(written).provenance["activation"]
        other = next(name for name in ACTIVATIONS if name != taken)
        say(
            f"activation: taken to be {taken}, by the files beside the weights or by their kind; "
            f"if it is not, use --activation {other}"
        )


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


_MOST_CLASSES = 256


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """What is made, and what it must reach."""

    precision: str = opt("int8 or fp8.", "int8")
    min_agreement: float = opt("Share of clear cells that must keep float32's label.", 0.98)
    max_miou_loss: float = opt(
        "With --dataset: points that mIoU may lose, and that unseen classes may lose beyond what "
        "seen ones lose.",
        0.5,
    )
    seed: int = opt("Chooses pictures and samples.", 0)
    sensitivity: bool = opt("Measure what each layer alone loses; takes longest.", True)


@dataclass(frozen=True, kw_only=True)
class _Masks(DataOptions):
    """Pictures with masks."""

    dataset: str = opt("Data set on whose masks mIoU is measured too.", "")


@takes_groups
def quantize(
    *,
    bundle: Annotated[Path, typer.Argument(help="Folder NAME.zsseg, a fetched name, or demo.")],
    photos: Annotated[
        Path | None,
        typer.Option(
            help="Folder with pictures like those to label, 8 to 512; default: the data set's."
        ),
    ] = None,
    masks: _Masks,
    out: OutOption,
    named: NamedClasses,
    gate: _Gate,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Write a bundle in INT8 or FP8; below the gate only the report is written (exit code 3)."""
    from zsseg_rt.bundles.bundle import Bundle

    check_file_place("--json", json_file)
    loaded, data = Bundle.load(bundle), None if masks == _Masks() else masks.open()
    classes = named.read_if_given() or _own_classes(loaded, data)
    with needs_extra("quantize", f"to quantise {bundle}"):
        from zsseg_rt.export.quantized.bundle import quantize_bundle
        from zsseg_rt.export.quantized.report import QuantizeSettings
    settings = QuantizeSettings(overwrite=overwrite, **vars(gate))
    with _interruptible(), ProgressBar() as bar:
        report = quantize_bundle(
            loaded,
            out,
            photos,
            classes,
            settings,
            lambda what, done, total: bar.show(done, total),
            dataset=data,
        )
    _print(report)
    if json_file is not None:
        write_json(json_file, report)
    if report.path is None:
        raise typer.Exit(EXIT_GATE)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end work as Ctrl-C does, with whatever it holds tidied up."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        with stopped_by_signals(interrupt):
            yield
    except KeyboardInterrupt:
        raise UserInterrupt("interrupted; nothing half-written was left") from None


def _own_classes(bundle: Bundle, data: SegmentationDataset | None) -> list[str | list[str]]:
    """The classes of a data set, or those that a bundle itself names."""
    if data is not None:
        return [*split_synonyms(data.class_names)]
    bank = bundle.text_bank.names if bundle.text_bank is not None else ()
    seen = bundle.concepts.names if bundle.concepts is not None else bundle.head.seen
    names = list(seen or bank)[:_MOST_CLASSES]
    if not names:
        raise UsageError("--classes: expected names, got none, and the bundle names none itself")
    return [*names]


def _print(report: QuantizeReport) -> None:
    spec = report.spec
    for row in report.layers:
        lost = "" if row.lost is None else f", alone it loses {row.lost:.2%}"
        say(
            f"{row.graph} {row.name}: {row.count} in {row.precision}, range {row.method}, error "
            f"{row.error:.1e}{lost}"
        )
    say(
        f"agreement with float32 on {spec.measured_photos} pictures that gave no ranges: "
        f"{spec.agreement:.2%} of clear cells (gate {spec.min_agreement:.2%}), "
        f"{spec.agreement_of_all:.2%} of all; with every layer in {report.precision}: "
        f"{report.everything:.2%}"
    )
    if spec.masks is not None:
        say(spec.masks.describe())
    end = "the gate does not hold; nothing was written" if report.path is None else None
    say(end or f"wrote {report.path}")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What plans are built for."""

    compute_capability: str | None = opt(
        "Target GPU, such as 8.9 (TensorRT-RTX alone); default: this machine's."
    )
    precision: str = opt(", ".join(PRECISIONS), "auto")
    workspace: int | None = opt("Most MB that the layers of a plan take to work in.", metavar="MB")


@takes_groups
def build(
    *,
    bundle: Annotated[Path, typer.Argument(help="Folder NAME.zsseg, a fetched name, or demo.")],
    target: _Target,
    json_file: JsonOption = None,
) -> None:
    """Build a bundle's TensorRT plans now, so that no first frame waits for them."""
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.runtime.plan_builds import BuildSettings, build_plans, plan_builds

    check_file_place("--json", json_file)
    loaded, settings = Bundle.load(bundle), BuildSettings(**vars(target))
    planned = plan_builds(loaded, settings)
    for one in planned:
        say(
            f"{one.graph} in {one.precision}: weights {one.weights / 1e6:.0f} MB, inputs and "
            f"outputs {one.tensors / 1e6:.1f} MB, activations of a lane at most "
            f"{one.activations / 1e6:.1f} MB; building takes up to about "
            f"{one.peak / 1e6:.0f} MB of memory"
        )
    finished: list[BuiltPlan] = []
    with _interruptible(), ProgressBar() as bar:

        def tell(_: str, fraction: float) -> None:
            bar.show(round(100 * (len(finished) + fraction)), 100 * len(planned))

        for plan in build_plans(loaded, settings, tell):
            finished.append(plan)
            took = f"built in {plan.seconds:.0f} s with {plan.peak / 1e6:.0f} MB of memory"
            say(
                f"{plan.graph}: {plan.size / 1e6:.0f} MB in {plan.precision}, "
                f"{'was there' if plan.was_there else took}: {plan.path}"
            )
    if json_file is not None:
        content = {"planned": [vars(one) for one in planned], "plans": [vars(p) for p in finished]}
        write_json(json_file, json.loads(json.dumps(content, default=str)))
