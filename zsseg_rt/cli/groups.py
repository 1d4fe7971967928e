"""Groups of options that several commands take; a command gets each as one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from zsseg_rt.cli.options import (
    ClassesOption,
    ClassOption,
    OutOption,
    OverwriteOption,
    TemplateOption,
    UnknownBelowOption,
    UsageError,
    argument_errors_are_usage,
    read_background,
    read_classes,
)
from zsseg_rt.cli.output import say, working
from zsseg_rt.cli.remarks import print_background
from zsseg_rt.config import BACKENDS, PRECISIONS, EngineConfig
from zsseg_rt.text.background import FEW_CLASSES

if TYPE_CHECKING:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.engine import Engine


R = TypeVar("R")


def opt(text: str, default: Any = None, *names: str, **settings: Any) -> Any:
    """Declare a field as an option with a text for ``--help``; ``...`` makes it required."""
    made = {"option": typer.Option(*names, help=text, **settings)}
    return field(metadata=made) if default is ... else field(default=default, metadata=made)


def takes_groups(command: Callable[..., R]) -> Callable[..., R]:
    """Put the fields of a command's groups, which are dataclasses, into its signature for Typer."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    flat: list[inspect.Parameter] = []
    for one in inspect.signature(command).parameters.values():
        if one.name in groups:
            flat += _parameters(groups[one.name])
        else:
            flat.append(one.replace(annotation=hints[one.name]))

    @functools.wraps(command)
    def run(**given: Any) -> R:
        made = {
            name: kind(**{part.name: given.pop(part.name) for part in fields(kind)})
            for name, kind in groups.items()
        }
        return command(**given, **made)

    vars(run)["__signature__"] = inspect.Signature(flat)
    run.__annotations__ = {one.name: one.annotation for one in flat}
    return run


def _parameters(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for part in fields(group):
        hint = hints[part.name]
        if "option" in part.metadata:
            hint = Annotated[hint, part.metadata["option"]]
        default = inspect.Parameter.empty if part.default is MISSING else part.default
        yield inspect.Parameter(
            part.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
        )


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How graphs run."""

    backend: str = opt(", ".join(BACKENDS), "auto")
    precision: str = opt(", ".join(PRECISIONS), "auto")
    threads: int = opt("CPU threads; 0 = all.", 0)

    def settings(self) -> dict[str, Any]:
        """The options under the names of an :class:`EngineConfig`."""
        return {"num_threads" if k == "threads" else k: v for k, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class _Place:
    device: str = opt("auto, cpu or cuda:N.", "auto")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(GraphOptions, _Place):
    """Where and how an engine runs."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ComputeOptions):
    """And how its model decides."""

    min_region_score: float | None = opt(
        "ZegFormer: CLIP runs only on regions at least this likely to be any class; 0 is "
        "exact, larger values are faster."
    )
    head_classes: str | None = opt(
        "CAT-Seg with more than 256 names: best gives its head the 256 nearest to the frame, as "
        "published; all gives it all."
    )
    max_candidates: int | None = opt(
        "With more names than this, label each frame only with those nearest to it."
    )
    windows: str | None = opt(
        "auto, or HEIGHTxWIDTH+STRIDE: keep a frame's shape and label overlapping windows of it."
    )
    max_windows: int | None = opt("Label a frame that would take more windows in one; default: 16.")
    resize: str | None = opt(
        "letterbox keeps a frame's shape in one window, stretch does not; default: the bundle's."
    )

    def config(self) -> EngineConfig:
        """The engine's settings."""
        settings = self.settings()
        if self.max_windows is None:
            del settings["max_windows"]
        return EngineConfig(**settings)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ModelOptions):
    """And which of its pixels stay unknown."""

    unknown_below: UnknownBelowOption = None


@dataclass(frozen=True, kw_only=True)
class NamedClasses:
    """The classes to look for."""

    classes: ClassesOption = None
    class_name: ClassOption = None

    def read_if_given(self) -> list[str | list[str]] | None:
        """The names, or None if neither option was given."""
        if self.classes is None and not self.class_name:
            return None
        return read_classes(self.classes, self.class_name or [])

    def read(self, bundle: Path, *, shows: str | None = None) -> list[str | list[str]]:
        """The names; none given means all that a bundle states it was trained to see.

        Args:
            bundle: The bundle.
            shows: The demo whose own inputs are shown, which have a list of their own.
        """
        from zsseg_rt.bundles.bundle import Bundle
        from zsseg_rt.demo import demo_classes

        if (names := self.read_if_given()) is not None:
            return names
        if shows is not None:
            return [*demo_classes(shows)]
        concepts = Bundle.load(bundle).concepts
        return read_classes(None, []) if concepts is None else [*concepts.names]


@dataclass(frozen=True, kw_only=True)
class WordOptions(NamedClasses):
    """The classes, and what else is put into words."""

    background: str = opt(
        '"a,b" or @FILE: phrases whose pixels become unknown; auto: the bundle\'s own, or '
        "published ones; none. Default: auto if it has its own or with up to "
        f"{FEW_CLASSES} classes, else none.",
        "",
    )
    template: TemplateOption = None

    def give(self, engine: Engine, names: Sequence[str | Sequence[str]]) -> None:
        """Set an engine's classes, and print which background phrases compete with them."""
        rivals = read_background(self.background, len(names))
        engine.set_classes(names, background=rivals, templates=self.template)
        print_background(engine, self.background)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What past frames are for."""

    steady: bool = opt(
        "Reduce flicker: blend scores with past ones along the motion.", False, "--steady"
    )
    skip_still: bool = opt(
        "Reuse the last labels for still frames, for up to 1 s.", False, "--skip-still"
    )

    def checked(self, path: Path) -> Path | Bundle:
        """The bundle; read before anything is opened if a memory is wanted."""
        if not (self.steady or self.skip_still):
            return path
        from zsseg_rt.bundles.bundle import Bundle
        from zsseg_rt.runtime.steady.memory import check_family

        bundle = Bundle.load(path)
        with argument_errors_are_usage():
            check_family(bundle.family)
        return bundle


def choose_bundle(
    bundle: Path | None, inputs: Sequence[str] | None, *, demo: str | None, missing: str
) -> Path:
    """The bundle to use; ``demo`` brings one and inputs of its own."""
    if demo:
        from zsseg_rt.demo import demo_bundle

        return bundle or demo_bundle(demo)
    if not inputs:
        raise UsageError(f"{missing}; or try --demo")
    if bundle is None:
        raise UsageError(
            "name a bundle: --bundle NAME.zsseg (zsseg-rt fetch gets one); or try --demo"
        )
    return bundle


def demo_source(demo: str | None, *, rate: int | None = None) -> str:
    """The camera that shows a demo's clip or pictures; None means the default one's."""
    from zsseg_rt.demo import DEFAULT

    other = [] if demo in (None, DEFAULT) else [f"demo={demo}"]
    settings = other + ([] if rate is None else [f"rate={rate}"])
    return f"test://?{'&'.join(settings)}" if settings else "test://"


@dataclass(frozen=True, kw_only=True)
class BundleOutput:
    """The bundle to write."""

    out: OutOption
    licence: str = opt("Licence of the weights.", "")
    overwrite: OverwriteOption = False

    def write(self, export: Callable[..., Path], *given: Any, **options: Any) -> Path:
        """Call the function that writes it, and print where it is."""
        written = export(
            *given, self.out, licence=self.licence, overwrite=self.overwrite, **options
        )
        say(f"wrote {written}")
        return written


@dataclass(frozen=True, kw_only=True)
class ModelOutput(BundleOutput):
    """The bundle to write of a model."""

    precision: list[str] | None = opt(
        "float32, float16, bfloat16; may repeat; default: the first two."
    )
    window_batch: int = opt("Windows of a frame that graphs take in one run: 1, 2 or 4.", 1)

    def graph_options(self) -> dict[str, Any]:
        """Which graphs are written: the usual precisions if none is asked for."""
        options: dict[str, Any] = {"precisions": tuple(self.precision or ("float32", "float16"))}
        return options if self.window_batch == 1 else {**options, "window_batch": self.window_batch}

    def write_model(self, model: Any, **options: Any) -> None:
        """Export a torch model."""
        from zsseg_rt.export import export_bundle

        with working("writing the graphs, then comparing them with torch; this takes minutes"):
            self.write(export_bundle, model, **self.graph_options(), **options)
