"""Groups of options that several commands take; a command gets each as one value."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from zsseg_rt.cli.options import (
    ClassesOption,
    ClassOption,
    TemplateOption,
    UsageError,
    argument_errors_are_usage,
    read_background,
    read_classes,
)
from zsseg_rt.cli.output import say, working
from zsseg_rt.common.settings import Option, changed
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.text.class_names import FEW_CLASSES

if TYPE_CHECKING:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.engine import Engine


R = TypeVar("R")


def opt(text: str, default: Any = None, *names: str, **extra: Any) -> Any:
    """Declare a field as an option with a text for ``--help``; ``...`` makes it required."""
    metadata = {"option": Option(text, names, extra=extra)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


class Takes:
    """Which fields of a dataclass are a command's options; ``defaults`` are the command's own."""

    def __init__(self, *names: str, but: Sequence[str] = (), **defaults: Any) -> None:
        self._names, self._but, self._defaults = names, but, defaults

    def parameters(self, group: Any) -> Iterator[inspect.Parameter]:
        """The options as parameters for Typer."""
        for name, part in self._fields(group).items():
            # One field's: types of others may be known to the type checker only.
            home = next(
                cls for cls in group.__mro__ if name in vars(cls).get("__annotations__", {})
            )
            one = SimpleNamespace(__annotations__={name: part.type})
            hints = get_type_hints(one, vars(sys.modules[home.__module__]), include_extras=True)
            hint, default = hints[name], part.default
            if option := part.metadata.get("option"):
                shown = typer.Option(*option.names, help=option.help, **(option.extra or {}))
                hint = Annotated[option.kind or hint, shown]
                default = default if option.kind is None else None
            default = self._defaults.get(name, default)
            default = inspect.Parameter.empty if default is MISSING else default
            kind = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(name, kind, default=default, annotation=hint)

    def build(self, group: Any, arguments: dict[str, Any]) -> Any:
        """The group, of values that are taken out of the arguments; a bad one is misuse."""
        options = self._fields(group)
        values = {name: arguments.pop(name) for name in options}
        for name, part in options.items():
            if "doc" in part.metadata:  # a setting, which has its default where nothing is given
                option, value = part.metadata["option"], values.pop(name)
                if option.read is not None and value is not None:
                    value = option.read(value)
                if value not in (None, []):
                    values[name] = tuple(value) if isinstance(value, list) else value
        try:
            return group(**values)
        except ArgumentError as exc:
            part = options.get(exc.argument or "")
            option = None if part is None else part.metadata.get("option")
            called = exc if option is None else exc.renamed(option.name(exc.argument))
            raise UsageError(str(called)) from exc

    def _fields(self, group: Any) -> dict[str, Any]:
        return {
            one.name: one
            for one in fields(group)
            if one.metadata.get("option", True) is not None
            and one.name not in self._but
            and (not self._names or one.name in self._names)
        }


def takes_groups(command: Callable[..., R]) -> Callable[..., R]:
    """Put the fields of a command's groups, which are dataclasses, into its signature for Typer."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, Takes]] = {}
    flat: list[inspect.Parameter] = []
    for one in inspect.signature(command).parameters.values():
        annotated = hasattr(hints[one.name], "__metadata__")
        kind, *notes = get_args(hints[one.name]) if annotated else [hints[one.name]]
        if is_dataclass(kind):
            takes = next((note for note in notes if isinstance(note, Takes)), Takes())
            groups[one.name] = (kind, takes)
            flat += takes.parameters(kind)
        else:
            flat.append(one.replace(annotation=hints[one.name], kind=one.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**arguments: Any) -> R:
        built = {name: takes.build(kind, arguments) for name, (kind, takes) in groups.items()}
        return command(**arguments, **built)

    vars(run)["__signature__"] = inspect.Signature(flat)
    run.__annotations__ = {one.name: one.annotation for one in flat}
    return run


ComputeOptions = Annotated[EngineConfig, Takes("device", "backend", "precision", "num_threads")]
"""Where and how an engine runs."""


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
        """The names; none given means all that a bundle states it was trained to see."""
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
        _print_background(engine, self.background)


def _print_background(engine: Engine, text: str) -> None:
    """Tell which background phrases were added, unless the caller wrote them out."""
    vocabulary = engine.vocabulary
    if vocabulary is None or not vocabulary.auto_background:
        return
    why = "asked for by --background auto" if text else f"added to {len(vocabulary.names)} class"
    why += "es" if not text and len(vocabulary.names) > 1 else ""
    if vocabulary.background:
        say(
            f"background ({why}): {', '.join(vocabulary.background)}. Pixels that they win are "
            "unknown; --background none leaves them out, --background 'a,b' takes others."
        )
    elif text:
        say("background: none of the published phrases fits this bundle and these classes")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Uses of past frames."""

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
        from zsseg_rt.runtime.frame_memory import check_family

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
    """The camera that shows a demo's clip or photos; None means the default one's."""
    from zsseg_rt.demo import DEFAULT

    other = [] if demo in (None, DEFAULT) else [f"demo={demo}"]
    settings = other + ([] if rate is None else [f"rate={rate}"])
    return f"test://?{'&'.join(settings)}" if settings else "test://"


ModelOptions = Annotated[ExportOptions, Takes("precisions", "licence", "overwrite")]
"""Of a bundle of a model."""


def write_bundle(
    export: Callable[..., Path], *arguments: Any, options: ExportOptions, **others: Any
) -> Path:
    """Call the function that writes a bundle, and print where it is."""
    written = export(*arguments, **changed(options), **others)
    say(f"wrote {written}")
    return written


def write_model(model: Any, out: Path, options: ExportOptions, **others: Any) -> None:
    """Export a torch model."""
    from zsseg_rt.export import export_bundle

    with working("writing the graphs, then comparing them with torch; this takes minutes"):
        write_bundle(export_bundle, model, out, options=options, **others)
