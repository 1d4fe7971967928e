"""``zsseg-rt import-checkpoint`` and ``fetch``: official and published weights become bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zsseg_rt.bundles.pretrained import SETS
from zsseg_rt.cli.options import (
    ModelOptions,
    OutOption,
    OwnSizeOption,
    SizeOption,
    flat_names,
    indices_of,
    misuse,
    opt,
    read_size,
    takes_groups,
    write_bundle,
)
from zsseg_rt.cli.output import ProgressBar, UsageError, UserInterrupt, say, working
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.files import is_file
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.fetch.checkpoints import Progress

if TYPE_CHECKING:
    from zsseg_rt.bundles.pretrained import PretrainedSet
    from zsseg_rt.torch_files.clip_arrays import ClipTensors

import_app = typer.Typer(help="Turn an official checkpoint into a bundle.", no_args_is_help=True)


_Checkpoint = Annotated[Path, typer.Argument(help="Official checkpoint (.pth, .safetensors).")]


@dataclass(frozen=True, kw_only=True)
class _Official:
    """A checkpoint of a system whose seen classes are lowered."""

    checkpoint: _Checkpoint
    dataset: str | None = opt("What it was trained on, such as voc2012: for --classes and --seen.")
    classes: str | None = opt('Training classes in order, "a,b" or @FILE; for --seen.')
    seen: str = opt('Names of the seen classes, "a,b" or @FILE.', "")

    def read(
        self, convention: Literal["zegclip", "zegformer"] = "zegclip", *, lowers_seen: bool = True
    ) -> tuple[list[str] | None, tuple[int, ...]]:
        """The training classes, and which were seen; authors' splits of a data set differ."""
        if self.dataset is None:
            names = flat_names(self.classes)
            seen = indices_of(flat_names(self.seen), names)
        elif self.classes is not None or self.seen:
            raise UsageError("--dataset: expected no --classes and no --seen beside it")
        else:
            from zsseg_rt.evaluation.datasets.published import published_classes

            with misuse(), arguments_called({"name": "--dataset"}):
                table = published_classes(self.dataset, convention=convention)
            names, seen = list(table.names), table.seen
        if lowers_seen and not seen:
            say(
                "remark: without --dataset or --seen, the published shift of the scores of seen "
                "classes is left out, and unseen classes get fewer pixels than published."
            )
        return names or None, seen


@dataclass(frozen=True, kw_only=True)
class _Descriptor(_Official):
    self_trained: bool = opt("Transductive checkpoint: no shift.", False)


@dataclass(frozen=True, kw_only=True)
class _ZegFormer(_Official):
    clip: str | None = opt("CLIP's weights, which checkpoints lack: ViT-B-16.pt, or openai.")
    fusion: str = opt(
        "Scores that count: segments, regions, or both: seen_and_unseen, all_classes.",
        "seen_and_unseen",
    )
    calibration: float = opt("Subtracted from the scores of seen classes.", 0.1)
    region_style: str = opt("Input of CLIP: cropmask, mask or crop.", "cropmask")
    prompts: str = opt("Prompts of the text branch: single (VOC), or imagenet_select.", "single")
    size: SizeOption = "512"


@dataclass(frozen=True, kw_only=True)
class _CatSeg:
    """A checkpoint of CAT-Seg, and the CLIP that it was tuned from."""

    checkpoint: _Checkpoint
    clip: str | None = opt("CLIP that it was tuned from, a file or openai: prints what is equal.")


@import_app.command("cat_seg")
@takes_groups
def import_cat_seg(source: _CatSeg, out: OutOption, bundle: ModelOptions) -> None:
    """Turn an official checkpoint of CAT-Seg B into a bundle; needs no torch."""
    from zsseg_rt.export.architectures.cat_seg import export_cat_seg_file
    from zsseg_rt.torch_files import official as files
    from zsseg_rt.torch_files.clip_arrays import describe_space

    if source.clip is None:
        _write(export_cat_seg_file, source.checkpoint, out, options=bundle)
        return
    clip = files.official_arrays(_read_clip(source.clip, source.checkpoint)[0])
    name = describe_space(source.clip)

    def compare(official: Mapping[str, Any]) -> None:
        equal = files.equal_keys(official, clip)
        all_of_it = sum(value.size for value in official.values())
        own = all_of_it - sum(official[key].size for key in equal)
        say(
            f"{len(equal)} of {len(clip)} tensors of {name} are equal; what differs is "
            f"{own / 1e6:.1f} M of {all_of_it / 1e6:.1f} M numbers"
        )

    export = partial(export_cat_seg_file, check=compare)
    with arguments_called({"clip": "--clip"}):
        _write(export, source.checkpoint, out, options=bundle)


@dataclass(frozen=True, kw_only=True)
class _Tips:
    vision: Annotated[Path, typer.Argument(help="The image tower, such as ..._b14_vision.npz.")]
    text: Path | None = opt("The text tower, ..._b14_text.npz; without it no class names.")
    tokenizer: Path | None = opt("TIPS's tokenizer.model; needed with --text.")
    logit_scale: float | None = opt("Factor of the cosine; default: 1 / the stored temperature.")
    unknown_below: float | None = opt("Probability in [0, 1] below which a pixel is unknown.")
    size: SizeOption = "448"
    template: list[str] | None = opt("Prompt with one {}; may repeat; default: TIPS's 9.")


@import_app.command("tips")
@takes_groups
def import_tips(source: _Tips, out: OutOption, bundle: ModelOptions) -> None:
    """Turn TIPSv2's official files, B/14 or L/14, into a bundle; needs no torch."""
    from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files

    shown = {name: getattr(source, name) for name in ("logit_scale", "unknown_below")}
    settings = TipsSettings(size_hw=read_size(source.size), **shown)
    others = {"tokenizer": source.tokenizer, "templates": source.template}
    _write(export_tips_files, source.vision, source.text, out, settings, options=bundle, **others)


@import_app.command("zegclip")
@takes_groups
def import_zegclip(source: _Descriptor, out: OutOption, bundle: ModelOptions) -> None:
    """Turn an official ZegCLIP checkpoint into a bundle."""
    _import_descriptor("zegclip", source, None, out, bundle)


def _import_descriptor(
    architecture: str, source: _Descriptor, size: str | None, out: Path, bundle: ExportOptions
) -> None:
    from zsseg_rt.export.architectures.descriptor import export_descriptor_file

    names, seen = source.read(lowers_seen=not source.self_trained)
    others: dict[str, Any] = {"size_hw": read_size(size) if size else None, "class_names": names}
    others["seen_classes"] = () if source.self_trained else seen
    _write(export_descriptor_file, source.checkpoint, out, architecture, options=bundle, **others)


@import_app.command("clip_rc")
@takes_groups
def import_clip_rc(
    *, source: _Descriptor, size: OwnSizeOption = None, out: OutOption, bundle: ModelOptions
) -> None:
    """Turn an official CLIP-RC checkpoint, of PyTorch or Jittor, into a bundle."""
    _import_descriptor("clip_rc", source, size, out, bundle)


@import_app.command("zegformer")
@takes_groups
def import_zegformer(source: _ZegFormer, out: OutOption, bundle: ModelOptions) -> None:
    """Turn an official ZegFormer checkpoint into a bundle; needs no torch."""
    from zsseg_rt.export.architectures.zegformer import ZegFormerSettings, export_zegformer_file
    from zsseg_rt.torch_files.clip_arrays import describe_space

    names, seen = source.read("zegformer")
    others: dict[str, Any] = {"class_names": names, "size_hw": read_size(source.size)}
    others |= {"templates": _zegformer_prompts(source.prompts), "template_set": source.prompts}
    own = {name: getattr(source, name) for name in ("fusion", "calibration", "region_style")}
    settings = ZegFormerSettings(seen_classes=seen, **own)
    if source.clip is not None:
        others["clip"], others["activation"] = _read_clip(source.clip, source.checkpoint)
        others["space"] = describe_space(source.clip)
    _write(export_zegformer_file, source.checkpoint, out, settings, options=bundle, **others)


def _zegformer_prompts(name: str) -> Sequence[str]:
    from zsseg_rt.torch_files.official import SEGMENT_TEMPLATES, SINGLE_TEMPLATE

    prompts = {"single": SINGLE_TEMPLATE, "imagenet_select": SEGMENT_TEMPLATES}
    if name not in prompts:
        raise UsageError(f"--prompts: expected one of {', '.join(prompts)}, got {name}")
    return prompts[name]


def _write(export: Callable[..., Path], checkpoint: Path, *more: Any, **others: Any) -> None:
    with working(f"reading {checkpoint}, writing the graphs, then comparing with NumPy"):
        write_bundle(export, checkpoint, *more, **others)


def _read_clip(source: str, checkpoint: Path) -> tuple[ClipTensors, str]:
    """CLIP's weights, from a file or fetched, and the activation; files are taken for OpenAI's."""
    from zsseg_rt.torch_files.clip_arrays import read_clip
    from zsseg_rt.torch_files.weights import require_file

    require_file(checkpoint)  # before anything is downloaded
    if is_file(Path(source)):
        return read_clip(source), "quick_gelu"
    tags = {one.tag: one for one in SETS.values() if one.clip == "ViT-B-16"}
    weights = tags.get(source)
    if weights is None or weights.architecture != "dense_clip":
        raise CheckpointError(f"--clip: expected a file or 'openai', got {source}. Check the path.")
    return read_clip(fetched_weights(weights)), weights.activation


@dataclass(frozen=True, kw_only=True)
class _Fetch:
    size: int | None = opt("Side of the input: 224, 336 or 448. 336 makes NAME-336, and so on.")
    keep_checkpoint: bool = opt("Keep the downloaded weights file.", False, "--keep-checkpoint")
    overwrite: bool = opt("Replace an existing bundle.", False)


@takes_groups
def fetch(
    *,
    name: Annotated[
        str | None, typer.Argument(help="Such as sfp-b16; without it, the names are listed.")
    ] = None,
    how: _Fetch,
) -> None:
    """Download published weights and make a bundle of them, for --bundle NAME.

    A download that was interrupted goes on where it stopped.
    """
    if name is None:
        _print_names()
        return
    from zsseg_rt.bundles.pretrained import known_set
    from zsseg_rt.fetch import fetch_bundle

    with misuse():
        if how.size not in (None, known_set(name).size):
            name = known_set(f"{name}-{how.size}").name
    settings = {"overwrite": how.overwrite, "keep_checkpoint": how.keep_checkpoint}
    try:
        with closing(_Shown()) as shown:
            fetch_bundle(name, **settings, progress=shown)
    except KeyboardInterrupt:
        raise UserInterrupt(
            f"interrupted; what was downloaded is kept. To go on: zsseg-rt fetch {name}"
        ) from None
    say(f"Try: zsseg-rt segment PHOTOS --bundle {name} --classes 'sky,road,person'")


def fetched_weights(weights: PretrainedSet) -> Path:
    """The weights file of a set: one that is here, or downloaded now and kept."""
    from zsseg_rt.fetch.checkpoints import find_checkpoints

    with closing(_Shown()) as shown:
        return find_checkpoints(weights, shown)[0].path


def _print_names() -> None:
    from zsseg_rt.bundles.pretrained import RECOMMENDED, SETS, bundle_place
    from zsseg_rt.fetch.checkpoints import megabytes

    lines = [
        f"Recommended for the best labels of any names without masks to train on: {RECOMMENDED}.",
        "This rests on published figures; none was reproduced here (docs/models.md).",
    ]
    for one in SETS.values():
        marks = ["recommended"] * (one.name == RECOMMENDED)
        marks += ["here"] * bundle_place(one.name).is_dir()
        lines += [
            one.name + (f"  ({', '.join(marks)})" if marks else ""),
            f"  {one.good_for}",
            f"  published: {one.published or 'no figure was read'}",
            f"  cost: {one.cost or 'not counted yet'}",
            f"  {megabytes(one.weight_bytes)}: {one.page}",
            *(f"    {file}" for file in one.files),
            f"  licence: {one.licence}",
        ]
    say(*lines)


class _Shown(Progress):
    """Prints lines, and a bar while bytes come."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        self.close()
        say(text)

    def downloaded(self, done: int, total: int | None) -> None:
        """Move the bar."""
        if self._bar is None:
            self._bar = ProgressBar(in_bytes=True).__enter__()
        self._bar.show(done, total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None
