"""Options that several commands take, alone and in groups, and how their text is read."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from zsseg_rt.cli.output import UsageError, say, working
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.settings import Option, changed
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.text.class_names import AUTO, FEW_CLASSES, NONE, Background, split_synonyms
from zsseg_rt.text.name_lists import read_name_list

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine

R = TypeVar("R")
_log = logging.getLogger(__name__)

WORDS = "zsseg_rt.words"
DemoOption = Annotated[
    str | None,
    typer.Option(
        metavar="[photos|scenes]",
        help="Use what ships with the package: bundle, pictures, classes; scenes: a drawn world.",
    ),
]
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle", "-b", help="Folder NAME.zsseg, a name of zsseg-rt fetch, demo or demo-scenes."
    ),
]
BundleArgument = Annotated[Path, typer.Argument(help="Folder NAME.zsseg, a fetched name, or demo.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for cameras that are off at first.")]
AlphaOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Overlay strength.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write, NAME.zsseg.")]
OwnSizeOption = Annotated[
    str | None,
    typer.Option("--size", help="Input in pixels: SIDE or HEIGHTxWIDTH; default: its own."),
]
SizeOption = Annotated[str, typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH.")]
TemplateOption = Annotated[list[str] | None, typer.Option(help="Prompt with one {}; may repeat.")]
TextHeadsOption = Annotated[int | None, typer.Option(help="Heads of a weights file's text tower.")]


class DemoCommand(TyperCommand):
    """A command whose ``--demo`` may be followed by a demo's name: ``--demo out.mp4`` has none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--demo`` its value, then parse; the words stay in ``ctx.meta``."""
        from zsseg_rt.demo import DEFAULT, DEMOS

        words = list(args)
        ctx.meta[WORDS] = list(args)
        for place, word in enumerate(args):
            if word == "--":
                break
            if word == "--demo" and (args[place + 1 : place + 2] or [""])[0] not in DEMOS:
                words[place] = f"--demo={DEFAULT}"
        return super().parse_args(ctx, words)


def read_classes(classes: str | None, single: Sequence[str]) -> list[str | list[str]]:
    """Read ``--classes`` and ``--class``; what the latter's commas mean is logged."""
    names: list[str | list[str]] = []
    if classes == "@":
        raise UsageError("--classes: expected a file's name after @, got none")
    if classes is not None and classes.startswith("@"):
        names += read_name_list(Path(classes[1:]), SourceError, with_ids=False).groups
    elif classes is not None and ";" in classes:
        names += [_one_class(part) for part in split(classes, ";") if split(part)]
    elif classes is not None:
        names += split(classes)
    for text in single:
        names.append(_one_class(text))
        if isinstance(names[-1], list):
            first, *further = names[-1]
            also = ", ".join(further)
            _log.warning("--class %r: one class, %r, also called %s", text, first, also)
    if not names:
        raise UsageError("name at least one class: --classes 'road,person' or @FILE")
    return names


@contextmanager
def misuse() -> Iterator[None]:
    """Turn a setting that is outside its range into a usage error."""
    try:
        yield
    except ArgumentError as exc:
        raise UsageError(str(exc)) from exc


def read_background(text: str, num_classes: int) -> Background:
    """Read ``--background``; where it is not given, few classes compete with published phrases."""
    if not text:
        return AUTO if num_classes <= FEW_CLASSES else None
    if text.startswith("@"):
        phrases = read_name_list(Path(text[1:]), SourceError, with_ids=False).names
        return [phrase for group in split_synonyms(phrases) for phrase in group]
    return text if text in (AUTO, NONE) else split(text)


def flat_names(text: str | None) -> list[str]:
    """Read "a,b" or @FILE; the first of several synonyms counts."""
    if not text:
        return []
    return [n if isinstance(n, str) else n[0] for n in read_classes(text, [])]


def indices_of(names: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """Where the names given to ``--seen`` stand among those given to ``--classes``."""
    places = {name: place for place, name in reversed(list(enumerate(classes)))}
    for name in names:
        if name not in places:
            raise UsageError(f"--seen: expected names from --classes, got {name!r}")
    return tuple(places[name] for name in names)


def read_size(text: str) -> tuple[int, int]:
    """Read "448" or "448x672" as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UsageError(f"--size: expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def check_activation(option: str, name: str | None) -> None:
    """Refuse a name that is not one of CLIP's activations."""
    if name not in (None, "quick_gelu", "gelu"):
        raise UsageError(f"{option}: expected quick_gelu or gelu, got {name}")


def split(text: str, separator: str = ",") -> list[str]:
    """Read "a,b" without empty parts."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def _one_class(text: str) -> str | list[str]:
    """A class written as its name and synonyms with commas between them."""
    synonyms = split(text)
    return synonyms if len(synonyms) > 1 else (synonyms or [text])[0]


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
        declared = {name: part.metadata.get("option") for name, part in options.items()}
        called = {name: option.name(name) for name, option in declared.items() if option}
        with misuse(), arguments_called(called):
            return group(**values)

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

    classes: str | None = opt(
        '"a,b,c"; with synonyms "a; b, c"; or @FILE: one class per line, commas = synonyms.'
    )
    class_name: list[str] | None = opt("One class; may repeat; commas = synonyms.", None, "--class")

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
        raise UsageError("name a bundle: --bundle NAME.zsseg (fetch gets one); or try --demo")
    return bundle


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
