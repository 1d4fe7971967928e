"""The command line, ``zsseg-rt``: argument parsing and printing; the work is in the package.

Exit codes: 0 ok, 1 failure, 2 usage, 3 a gate was not met, 4 environment.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.config import BACKENDS, PRECISIONS, EngineConfig
from zsseg_rt.errors import (
    BackendUnavailableError,
    DeviceError,
    PrecisionNotApplied,
    SourceError,
    ZssegError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from zsseg_rt.batch import PhotoResult
    from zsseg_rt.engine import Engine

__all__ = ["app", "main"]

# Typer re-exports this class's child only, and which package defines both depends on its version.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}  # mean and std of RGB in 0..1: OpenAI CLIP's and torchvision's

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_ENVIRONMENT = 0, 1, 2, 3, 4

app = typer.Typer(
    name="zsseg-rt",
    help="Zero-shot semantic segmentation: name classes at run time, label every pixel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
import_app = typer.Typer(help="Turn an official checkpoint into a bundle.", no_args_is_help=True)
export_app = typer.Typer(help="Export a model to a bundle.", no_args_is_help=True)
app.add_typer(import_app, name="import-checkpoint")
app.add_typer(export_app, name="export")

BundleOption = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle folder NAME.zsseg.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write, NAME.zsseg.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace an existing bundle.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Official checkpoint (.pth, .safetensors).")
]
TrainingClassesOption = Annotated[
    str | None, typer.Option(help='Training classes in order, "a,b" or @FILE; for --seen.')
]
SeenOption = Annotated[str, typer.Option(help='Names of the seen classes, "a,b" or @FILE.')]
SelfTrainedOption = Annotated[bool, typer.Option(help="A transductive checkpoint: no shift.")]
PrecisionsOption = Annotated[
    list[str] | None, typer.Option(help="float32, float16; may repeat; default both.")
]
LicenceOption = Annotated[str, typer.Option(help="Licence of the weights.")]
TrustOption = Annotated[
    bool, typer.Option(help="Load a pickle that may run code; only if you trust its author.")
]


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is done.")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)


@app.command()
def segment(
    photos: Annotated[list[str], typer.Argument(help="Photos, folders or glob patterns.")],
    bundle: BundleOption,
    classes: Annotated[
        str | None, typer.Option(help='"a,b,c", or @FILE: one class a line, commas = synonyms.')
    ] = None,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="One class; may repeat, may hold commas.")
    ] = None,
    background: Annotated[
        str, typer.Option(help="Comma-separated phrases whose pixels become unknown.")
    ] = "",
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with one {}; may repeat.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures.")] = Path(
        "zsseg_out"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option(help=", ".join(BACKENDS))] = "auto",
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = all.")] = 0,
    unknown_below: Annotated[
        float | None, typer.Option(help="Score in [0, 1] under which a pixel is unknown.")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="Overlay strength.")] = 0.5,
    resume: Annotated[bool, typer.Option(help="Skip photos that are already done.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Label every pixel of photos: an overlay, a label picture and a table of classes for each."""
    from zsseg_rt import batch
    from zsseg_rt.engine import Engine

    names = read_classes(classes, class_name or [])
    found = batch.find_photos(photos)
    config = EngineConfig(
        device=device,
        backend=backend,
        precision=precision,
        num_threads=threads,
        unknown_below=unknown_below,
    )
    with Engine(bundle, config) as engine:
        engine.set_classes(names, background=_split(background), templates=template)
        results = _segment_with_progress(engine, found, out, alpha=alpha, resume=resume)
        if json_file is not None:
            _write_json(json_file, {"engine": _describe(engine), "photos": results})
    failed = [result for result in results if result.error is not None]
    if failed:
        raise SourceError(f"{len(failed)} of {len(results)} photos failed; see above")


@app.command()
def info(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder NAME.zsseg.")],
    names: Annotated[bool, typer.Option(help="List the names of the text bank.")] = False,
    check: Annotated[bool, typer.Option(help="Hash all files and run the golden sample.")] = False,
    precision: Annotated[str, typer.Option(help="Precision of the check.")] = "auto",
    json_file: JsonOption = None,
) -> None:
    """Show what a bundle holds; with --check, whether it works here (exit code 3 if not)."""
    from zsseg_rt.bundle import Bundle

    loaded = Bundle.load(bundle)
    manifest = loaded.to_manifest()
    if json_file is not None:
        _write_json(json_file, manifest)
    console = _console()
    console.print(f"{loaded.name}: {loaded.architecture}, family {loaded.family}")
    height, width = loaded.preprocess.size_hw
    console.print(f"input {height}x{width}, grid {loaded.head.grid_hw}, text {loaded.text.space}")
    for graph, variants in loaded.graphs.items():
        sizes = ", ".join(f"{p} {e.bytes / 1e6:.1f} MB" for p, e in variants.items())
        console.print(f"{graph}: {sizes}")
    bank = loaded.text_bank.names if loaded.text_bank is not None else ()
    console.print(f"text bank: {len(bank)} names; licence: {loaded.licence or 'not stated'}")
    if names:
        for name in bank:
            console.print(f"  {name}", highlight=False)
    if check:
        _run_self_check(bundle, precision)


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
    names = _flat_names(classes)
    model = _load_official(
        "zegclip",
        checkpoint,
        trust=trust,
        seen_classes=_indices_of(_flat_names(seen), names),
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
    names = _flat_names(classes)
    model = _load_official(
        "clip_rc",
        checkpoint,
        trust=trust,
        seen_classes=_indices_of(_flat_names(seen), names),
        self_trained=self_trained,
        with_recovery_decoder=False,
    )
    options = {"class_names": names or None, "licence": licence, "overwrite": overwrite}
    _write_bundle(model, out, precision, size_hw=_read_size(size) if size else None, **options)


@export_app.command("dense")
def export_dense(
    encoder: Annotated[Path, typer.Argument(help="ONNX graph from image to dense embeddings.")],
    out: OutOption,
    size: Annotated[int, typer.Option(min=1, help="Side of the square input in pixels.")],
    bank: Annotated[
        tuple[Path, Path], typer.Option(help="Names (one a line, or JSON list) and rows (.npy).")
    ],
    embed_output: Annotated[
        str | None, typer.Option(help="The graph's output with the embeddings; default the first.")
    ] = None,
    statistics: Annotated[
        str, typer.Option("--mean", help="Normalisation: clip, imagenet or none.")
    ] = "clip",
    logit_scale: Annotated[float, typer.Option(help="Multiplies the cosine similarity.")] = 100.0,
    activation: Annotated[str, typer.Option(help="none, sigmoid or softmax.")] = "softmax",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Wrap an ONNX encoder whose patches live in a text space, with its text embeddings."""
    from zsseg_rt.export import export_dense_bundle

    if statistics not in STATISTICS:
        raise UsageError(f"--mean: expected one of {', '.join(STATISTICS)}, got {statistics}")
    mean, std = STATISTICS[statistics]
    written = export_dense_bundle(
        encoder,
        out,
        image_size=size,
        mean=mean,
        std=std,
        embed_output=embed_output,
        text_bank=_read_bank(*bank),
        logit_scale=logit_scale,
        activation=activation,
        licence=licence,
        overwrite=overwrite,
    )
    _console().print(f"wrote {written}", highlight=False)


@export_app.command("dense-clip")
def export_dense_clip(
    out: OutOption,
    pretrained: Annotated[
        str, typer.Option(help="open_clip tag such as openai, or a weights file.")
    ],
    clip: Annotated[str, typer.Option(help="open_clip's name of the ViT, for a tag.")] = "ViT-B-16",
    head: Annotated[
        str, typer.Option(help="naclip, clearclip, sclip, maskclip or vanilla.")
    ] = "naclip",
    size: Annotated[str, typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH.")] = "448",
    logit_scale: Annotated[
        float | None, typer.Option(help="Multiplies the cosine; default the head's.")
    ] = None,
    unknown_below: Annotated[
        float | None, typer.Option(help="Probability in [0, 1] under which a pixel is unknown.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with one {}; may repeat; default CLIP's 80.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="quick_gelu or gelu, for a file that does not say.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Heads of the image tower, for a file.")
    ] = None,
    text_heads: Annotated[
        int | None, typer.Option(help="Heads of the text tower, for a file.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="float32, float16; may repeat; default both.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    trust: Annotated[
        bool, typer.Option(help="Load a pickle that may run code; only if you trust its author.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Export plain CLIP with a training-free dense head, its text tower and its tokenizer."""
    from zsseg_rt.export import export_bundle
    from zsseg_rt.models import create_model

    if activation not in (None, "quick_gelu", "gelu"):
        raise UsageError(f"--activation: expected quick_gelu or gelu, got {activation}")
    model = create_model(
        "dense_clip",
        pretrained=pretrained,
        clip=clip,
        head=head,
        image_size=_read_size(size),
        logit_scale=logit_scale,
        unknown_below=unknown_below,
        templates=template,
        activation=activation,
        num_heads=num_heads,
        text_heads=text_heads,
        trust=trust,
    )
    written = export_bundle(
        model,
        out,
        precisions=tuple(precision or ("float32", "float16")),
        source=Path(pretrained).name,
        licence=licence,
        overwrite=overwrite,
    )
    _console().print(f"wrote {written}", highlight=False)


@export_app.command("colour-words")
def export_colour_words(out: OutOption, overwrite: OverwriteOption = False) -> None:
    """Write a bundle that labels colours, made from a formula: a first run without any weights."""
    from zsseg_rt.export.colour_words import COLOUR_WORDS, export_colour_bundle

    written = export_colour_bundle(out, overwrite=overwrite)
    _console().print(f"wrote {written}; it knows: {', '.join(COLOUR_WORDS)}", highlight=False)


@app.command()
def doctor(json_file: JsonOption = None) -> None:
    """Show what can run on this machine, and the remedy for what cannot."""
    from rich.table import Table
    from rich.text import Text

    from zsseg_rt.doctor import examine

    findings = examine()
    table = Table("topic", "", "found", "what to do", box=None, pad_edge=False)
    colours = {"ok": "green", "absent": "yellow", "bad": "red"}
    for f in findings:
        table.add_row(f.topic, Text(f.status, style=colours[f.status]), f.detail, f.remedy)
    _console().print(table)
    if json_file is not None:
        _write_json(json_file, {"findings": findings})
    if any(f.status == "bad" for f in findings):
        raise typer.Exit(EXIT_ENVIRONMENT)


def read_classes(classes: str | None, single: Sequence[str]) -> list[str | list[str]]:
    """Read ``--classes`` and ``--class``.

    Args:
        classes: ``"a,b"``, or ``"@FILE"`` with one class a line, commas between synonyms; empty
            lines and lines that begin with ``#`` are skipped.
        single: Whole class names, commas and all.

    Raises:
        UsageError: No class at all.
        SourceError: The file cannot be read.
    """
    names: list[str | list[str]] = []
    if classes is not None and classes.startswith("@"):
        names += _read_class_file(Path(classes[1:]))
    elif classes is not None:
        names += _split(classes)
    names += list(single)
    if not names:
        raise UsageError("name at least one class: --classes 'road,person' or @FILE")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; what the console script calls."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="zsseg-rt",
            standalone_mode=False,
        )
    except UsageError as exc:
        return _fail(EXIT_USAGE, _usage_message(exc))
    except typer.Abort:
        return _fail(EXIT_FAILURE, "interrupted")
    except (DeviceError, BackendUnavailableError, PrecisionNotApplied) as exc:
        return _fail(EXIT_ENVIRONMENT, str(exc), debug)
    except ZssegError as exc:
        return _fail(EXIT_FAILURE, str(exc), debug)
    except ValueError as exc:
        return _fail(EXIT_USAGE, str(exc), debug)
    except KeyboardInterrupt:
        return _fail(EXIT_FAILURE, "interrupted")
    return int(code or EXIT_OK)


def _usage_message(error: Exception) -> str:
    """What a usage error says; help that was shown for want of arguments says nothing more."""
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return text or "expected a command or arguments; see --help"


def _fail(code: int, message: str, debug: bool = False) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    typer.echo(f"zsseg-rt: {' '.join(message.split())}", err=True)
    return code


def _segment_with_progress(
    engine: Engine, photos: Sequence[Path], out: Path, *, alpha: float, resume: bool
) -> list[PhotoResult]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from zsseg_rt import batch

    console = _console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=len(photos) < 2, transient=True) as bar:
        task = bar.add_task("photos", total=len(photos))

        def show(result: PhotoResult, _: Any) -> None:
            _print_result(console, result)
            bar.advance(task)

        return batch.segment_photos(engine, photos, out, alpha=alpha, resume=resume, on_done=show)


def _print_result(console: Console, result: PhotoResult) -> None:
    from rich.table import Table
    from rich.text import Text

    if result.error is not None:
        console.print(f"failed: {result.error}", style="red", highlight=False, soft_wrap=True)
        return
    height, width = result.size_hw or (0, 0)
    total = (result.times or {}).get("total", 0.0)
    state = "done earlier" if result.resumed else f"{total:.0f} ms"
    console.print(f"{result.photo}  {width}x{height}, {state}", highlight=False, soft_wrap=True)
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
    console.print(f"  {result.overlay}\n  {result.mask}", highlight=False, soft_wrap=True)


def _run_self_check(bundle: Path, precision: str) -> None:
    from zsseg_rt.bundle import Bundle
    from zsseg_rt.engine import Engine

    loaded = Bundle.load(bundle)
    loaded.verify()
    with Engine(loaded, EngineConfig(precision=precision)) as engine:
        report = engine.self_check()
        _console().print(f"self-check of {engine!r}:", highlight=False)
    for stage in report.stages:
        verdict = "ok" if stage.passed else "FAILED"
        _console().print(
            f"  {stage.stage:14} error {stage.error:.2e} of {stage.tolerance:.0e}  {verdict}",
            highlight=False,
        )
    if not report.passed:
        raise typer.Exit(EXIT_GATE)


def _describe(engine: Engine) -> dict[str, Any]:
    return {
        "bundle": engine.bundle.name,
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "names": [] if engine.vocabulary is None else list(engine.vocabulary.names),
    }


def _read_class_file(path: Path) -> list[str | list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise SourceError(f"{path}: class file cannot be read: {exc}") from exc
    names: list[str | list[str]] = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        synonyms = _split(line)
        names.append(synonyms[0] if len(synonyms) == 1 else synonyms)
    return names


def _flat_names(text: str | None) -> list[str]:
    """Read "a,b" or @FILE; of synonyms the first counts."""
    if not text:
        return []
    return [n if isinstance(n, str) else n[0] for n in read_classes(text, [])]


def _load_official(architecture: str, checkpoint: Path, *, trust: bool, **config: Any) -> Any:
    """Build a model from a checkpoint file in its authors' layout."""
    from zsseg_rt.models import from_official, load_checkpoint, normalize_state_dict

    state_dict = normalize_state_dict(load_checkpoint(checkpoint, trust=trust))
    return from_official(architecture, state_dict, **config)


def _write_bundle(model: Any, out: Path, precision: Sequence[str] | None, **options: Any) -> None:
    from zsseg_rt.export import export_bundle

    precisions = tuple(precision or ("float32", "float16"))
    written = export_bundle(model, out, precisions=precisions, **options)
    _console().print(f"wrote {written}", highlight=False)


def _indices_of(names: Sequence[str], known: Sequence[str]) -> tuple[int, ...]:
    for name in names:
        if name not in known:
            raise UsageError(f"--seen: expected names out of --classes, got {name!r}")
    return tuple(known.index(name) for name in names)


def _read_size(text: str) -> tuple[int, int]:
    """Read "448" or "448x672" as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UsageError(f"--size: expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _read_bank(names_file: Path, rows_file: Path) -> tuple[list[str], Any]:
    import numpy as np

    try:
        text = names_file.read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        rows = np.load(rows_file, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise SourceError(f"--bank: cannot be read: {exc}") from exc
    return [str(name) for name in names if str(name).strip()], rows.astype(np.float32)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _write_json(path: Path, content: Any) -> None:
    from zsseg_rt.schema import encode
    from zsseg_rt.visualize import save_file

    text = json.dumps(encode(content), indent=2, ensure_ascii=False)
    save_file(path, (text + "\n").encode())


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False)  # names and paths may hold square brackets


if __name__ == "__main__":
    sys.exit(main())
