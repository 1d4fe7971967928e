"""``zsseg-rt import-checkpoint``: from official checkpoints to bundles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from zsseg_rt.bundles.pretrained import SETS
from zsseg_rt.cli.fetch import fetched_weights
from zsseg_rt.cli.groups import ModelOptions, opt, takes_groups, write_bundle, write_model
from zsseg_rt.cli.options import (
    OutOption,
    SizeOption,
    UsageError,
    argument_errors_are_usage,
    flat_names,
    indices_of,
    read_size,
)
from zsseg_rt.cli.output import ProgressBar, say, working
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.files import is_file
from zsseg_rt.export.options import ExportOptions

import_app = typer.Typer(help="Turn an official checkpoint into a bundle.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """A checkpoint in its authors' layout."""

    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint (.pth, .safetensors).")]

    def settings(self) -> dict[str, Any]:
        """What the checkpoint does not say."""
        return {}

    def read(self) -> dict[str, Any]:
        """Its tensors, float32."""
        from zsseg_rt.models import load_checkpoint, normalize_state_dict

        return normalize_state_dict(load_checkpoint(self.checkpoint))

    def load(self, architecture: str, **settings: Any) -> Any:
        """Build the model."""
        if not is_file(self.checkpoint):
            self.read()  # says so before anything is downloaded
        chosen = self.settings() | settings
        with working(f"reading {self.checkpoint}"):
            from zsseg_rt.models import from_official

            return from_official(architecture, self.read(), **chosen)


@dataclass(frozen=True, kw_only=True)
class _Official(_Checkpoint):
    """A checkpoint of a system whose seen classes are lowered."""

    dataset: str | None = opt(
        "Data set that it was trained on, such as voc2012 or cocostuff164k: its classes and its "
        "split, instead of --classes and --seen."
    )
    classes: str | None = opt('Training classes in order, "a,b" or @FILE; for --seen.')
    seen: str = opt('Names of the seen classes, "a,b" or @FILE.', "")

    convention: ClassVar[Literal["zegclip", "zegformer"]] = "zegclip"
    """Whose split of a data set, where authors differ."""

    @property
    def names(self) -> list[str] | None:
        """The training classes, or None if they are not given."""
        return self._classes()[0]

    def settings(self, *, lowers_seen: bool = True) -> dict[str, Any]:
        """Those that every such system takes."""
        seen = self._classes()[1]
        if lowers_seen and not seen:
            say(
                "remark: without --dataset or --seen, the published shift of the scores of seen "
                "classes is left out, and unseen classes get fewer pixels than published."
            )
        return {"seen_classes": seen}

    def _classes(self) -> tuple[list[str] | None, tuple[int, ...]]:
        """The training classes, and which of them were seen."""
        if self.dataset is None:
            names = flat_names(self.classes)
            return names or None, indices_of(flat_names(self.seen), names)
        if self.classes is not None or self.seen:
            raise UsageError("--dataset: expected no --classes and no --seen beside it")
        from zsseg_rt.evaluation.datasets.published import published_classes

        with argument_errors_are_usage(), arguments_called({"name": "--dataset"}):
            table = published_classes(self.dataset, convention=self.convention)
        return list(table.names), table.seen


@dataclass(frozen=True, kw_only=True)
class _Descriptor(_Official):
    """A checkpoint of ZegCLIP or CLIP-RC."""

    self_trained: bool = opt("Transductive checkpoint: no shift.", False)

    def settings(self, *, lowers_seen: bool = True) -> dict[str, Any]:
        """And how the classes that were not annotated were trained."""
        shared = super().settings(lowers_seen=lowers_seen and not self.self_trained)
        return shared | {"self_trained": self.self_trained}


@dataclass(frozen=True, kw_only=True)
class _ZegFormer(_Official):
    """A checkpoint of ZegFormer, and how its two branches decide."""

    clip: str | None = opt(
        "CLIP's weights, which checkpoints lack: OpenAI's ViT-B-16.pt, or a tag of "
        "open_clip such as openai."
    )
    fusion: str = opt(
        "Which scores count: segments, CLIP on their regions, or both, weighted by "
        "whether a class is seen (seen_and_unseen) or alike (all_classes).",
        "seen_and_unseen",
    )
    calibration: float = opt("Subtracted from the scores of seen classes.", 0.1)
    region_style: str = opt("Input of CLIP: cropmask, mask or crop.", "cropmask")

    convention = "zegformer"

    def settings(self, *, lowers_seen: bool = True) -> dict[str, Any]:
        """And those of its own."""
        from zsseg_rt.bundles.specs import FUSIONS

        if self.fusion not in FUSIONS:
            raise UsageError(f"--fusion: expected one of {', '.join(FUSIONS)}, got {self.fusion}")
        own = ("fusion", "calibration", "region_style")
        chosen = super().settings(lowers_seen=lowers_seen) | {
            name: getattr(self, name) for name in own
        }
        return chosen | {"clip": _load_clip(self.clip)}


@dataclass(frozen=True, kw_only=True)
class _CatSeg(_Checkpoint):
    """A checkpoint of CAT-Seg, and the CLIP that it was tuned from."""

    clip: str | None = opt(
        "CLIP that it was tuned from, OpenAI's ViT-B-16.pt or a tag such as openai: prints what is "
        "equal; needed if the checkpoint is a difference."
    )
    difference: Path | None = opt(
        "Also write what differs from --clip, FILE.safetensors, a sixth of the size: a checkpoint "
        "that is imported with the same --clip."
    )

    def load(self, architecture: str, **settings: Any) -> Any:
        """Build the model, and say what of it is CLIP's."""
        if self.difference is not None:
            self._check_difference(self.difference)
        if self.clip is None:
            return super().load(architecture, **settings)
        from zsseg_rt.models import from_official
        from zsseg_rt.torch_files import clip_difference as files

        clip = files.official_tensors(_load_clip(self.clip))
        with arguments_called({"clip": "--clip"}):
            state_dict = files.read_difference(self.checkpoint, clip) or self.read()
            equal = files.equal_keys(state_dict, clip)
        model = from_official(architecture, state_dict, **settings)
        name, own = _describe_space(self.clip), files.difference(state_dict, equal)
        mine, all_of_it = (sum(v.numel() for v in part.values()) for part in (own, state_dict))
        say(
            f"{len(equal)} of {len(clip)} tensors of {name} are equal; what differs is "
            f"{mine / 1e6:.1f} M of {all_of_it / 1e6:.1f} M numbers"
        )
        if self.difference is not None:
            files.write_difference(self.difference, state_dict, equal, name)
            say(f"wrote {self.difference}")
        return model

    def _check_difference(self, path: Path) -> None:
        if self.clip is None:
            raise UsageError("--difference: expected --clip beside it, got none")
        if path.suffix != ".safetensors" or path.exists():
            raise UsageError(f"--difference: expected a new file NAME.safetensors, got {path}")


@import_app.command("cat_seg")
@takes_groups
def import_cat_seg(source: _CatSeg, out: OutOption, bundle: ModelOptions) -> None:
    """Turn an official checkpoint of CAT-Seg B into a bundle."""
    write_model(source.load("cat_seg"), out, bundle, source=source.checkpoint.name)


@dataclass(frozen=True, kw_only=True)
class _Tips:
    """TIPSv2's files, and how labels are made."""

    vision: Annotated[Path, typer.Argument(help="The image tower, such as ..._b14_vision.npz.")]
    text: Path | None = opt("The text tower, ..._b14_text.npz; without it no class names.")
    tokenizer: Path | None = opt("TIPS's tokenizer.model; needed with --text.")
    logit_scale: float | None = opt("Factor of the cosine; default: 1 / the stored temperature.")
    unknown_below: float | None = opt("Probability in [0, 1] below which a pixel is unknown.")


@import_app.command("tips")
@takes_groups
def import_tips(
    *,
    source: _Tips,
    size: SizeOption = "448",
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with one {}; may repeat; default: TIPS's 9.")
    ] = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Turn TIPSv2's official files, B/14 or L/14, into a bundle; needs no torch."""
    from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files

    settings = TipsSettings(
        size_hw=read_size(size),
        logit_scale=source.logit_scale,
        unknown_below=source.unknown_below,
    )
    with ProgressBar() as bar:
        write_bundle(
            partial(export_tips_files, on_progress=bar.show),
            source.vision,
            source.text,
            out,
            settings,
            options=bundle,
            tokenizer=source.tokenizer,
            templates=template,
        )


@import_app.command("zegclip")
@takes_groups
def import_zegclip(source: _Descriptor, out: OutOption, bundle: ModelOptions) -> None:
    """Turn an official ZegCLIP checkpoint into a bundle."""
    _import_descriptor("zegclip", source, None, out, bundle)


def _import_descriptor(
    architecture: str, source: _Descriptor, size: str | None, out: Path, bundle: ExportOptions
) -> None:
    """Needs no torch."""
    from zsseg_rt.export.architectures.descriptor import (
        DescriptorSettings,
        export_descriptor_file,
    )

    size_hw = read_size(size) if size else None
    settings = DescriptorSettings(size_hw=size_hw, **source.settings())
    with working(f"reading {source.checkpoint}, writing the graphs, then comparing with NumPy"):
        write_bundle(
            export_descriptor_file,
            source.checkpoint,
            out,
            architecture,
            settings,
            options=bundle,
            class_names=source.names,
        )


@import_app.command("clip_rc")
@takes_groups
def import_clip_rc(
    *,
    source: _Descriptor,
    size: Annotated[
        str | None,
        typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH; default: the official one."),
    ] = None,
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Turn an official CLIP-RC checkpoint, of PyTorch or Jittor, into a bundle."""
    _import_descriptor("clip_rc", source, size, out, bundle)


@import_app.command("zegformer")
@takes_groups
def import_zegformer(
    *,
    source: _ZegFormer,
    prompts: Annotated[
        str, typer.Option(help="Prompts of the text branch: single (VOC), or imagenet_select.")
    ] = "single",
    size: SizeOption = "512",
    out: OutOption,
    bundle: ModelOptions,
) -> None:
    """Turn an official ZegFormer checkpoint into a bundle."""
    templates = _zegformer_prompts(prompts)
    space = {} if source.clip is None else {"space": _describe_space(source.clip)}
    write_model(
        source.load("zegformer"),
        out,
        bundle,
        class_names=source.names,
        templates=templates,
        template_set=prompts,
        size_hw=read_size(size),
        source=source.checkpoint.name,
        **space,
    )


def _zegformer_prompts(name: str) -> Sequence[str]:
    from zsseg_rt.torch_files.zegformer_prompts import SEGMENT_TEMPLATES, SINGLE_TEMPLATE

    known = {"single": SINGLE_TEMPLATE, "imagenet_select": SEGMENT_TEMPLATES}
    if name not in known:
        raise UsageError(f"--prompts: expected one of {', '.join(known)}, got {name}")
    return known[name]


def _load_clip(source: str | None) -> Any:
    """CLIP's weights from a file or a tag; files without an activation are OpenAI's."""
    if source is None:
        return None
    activation: Any = "quick_gelu" if is_file(Path(source)) else None
    known = next((s for s in SETS.values() if (s.clip, s.tag) == ("ViT-B-16", source)), None)
    if activation is None and known is not None:
        source, activation = str(fetched_weights(known)), known.activation
    from zsseg_rt.models import load_clip

    with arguments_called({"source": "--clip"}):
        return load_clip(source, activation=activation)


def _describe_space(source: str) -> str:
    from zsseg_rt.torch_files.clip_space import describe_space

    return describe_space(source)
