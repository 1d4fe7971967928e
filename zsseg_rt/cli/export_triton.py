"""``zsseg-rt export BUNDLE --triton DIR``: a bundle as a model of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zsseg_rt.cli.groups import NamedClasses, Takes, takes_groups
from zsseg_rt.cli.options import UsageError
from zsseg_rt.cli.output import say
from zsseg_rt.common.settings import changed
from zsseg_rt.config import EngineConfig

_NAME = "triton"
_ENGINE = Takes("backend", "precision", "unknown_below", "num_threads")  # on Triton's device


class BundleOrCommand(TyperGroup):
    """Takes ``BUNDLE --triton DIR`` where the name of a command is expected."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name before a bundle's."""
        if not self.commands.keys() & set(args[:1]):
            if any(word.split("=")[0] == "--triton" for word in args):
                args = [_NAME, *args]
            elif args and not args[0].startswith("-"):
                raise UsageError(
                    f"expected BUNDLE --triton DIR or one of {', '.join(self.commands)}; "
                    f"got {args[0]!r}. See zsseg-rt export --help."
                )
        return list(super().parse_args(ctx, args))


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
    from zsseg_rt.common.checks import arguments_called
    from zsseg_rt.integrations.triton import write_triton_model

    names = words.read_if_given() or ()
    with arguments_called({"name": "--name"}):
        written = write_triton_model(
            bundle,
            repository,
            name=name,
            classes=names,
            engine=changed(engine),
            overwrite=overwrite,
        )
    say(f"wrote {written}")
    say(f"run: tritonserver --model-repository={repository}")
