"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.text.class_names import AUTO, FEW_CLASSES, NONE, Background, split_synonyms
from zsseg_rt.text.name_lists import read_name_list

_log = logging.getLogger(__name__)

WORDS = "zsseg_rt.words"
# Typer re-exports only a subclass of this, and which package defines both depends on its version.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

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
ClassesOption = Annotated[
    str | None,
    typer.Option(
        help='"a,b,c"; with synonyms "a; b, c"; or @FILE: one class per line, commas = synonyms.'
    ),
]
ClassOption = Annotated[
    list[str] | None, typer.Option("--class", help="One class; may repeat; commas = synonyms.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait for cameras that are off at the start.")
]
AlphaOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Overlay strength.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write, NAME.zsseg.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace an existing bundle.")]
SizeOption = Annotated[str, typer.Option(help="Input in pixels: SIDE or HEIGHTxWIDTH.")]
TemplateOption = Annotated[list[str] | None, typer.Option(help="Prompt with one {}; may repeat.")]
TextHeadsOption = Annotated[
    int | None, typer.Option(help="Heads of the text tower, for a weights file.")
]


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
            _log.warning(
                "--class %r: one class, %r, also called %s", text, first, ", ".join(further)
            )
    if not names:
        raise UsageError("name at least one class: --classes 'road,person' or @FILE")
    return names


@contextmanager
def argument_errors_are_usage() -> Iterator[None]:
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
