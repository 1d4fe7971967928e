"""``zsseg-rt fetch``: published weights by name, as bundles."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsseg_rt.cli.groups import opt, takes_groups
from zsseg_rt.cli.options import argument_errors_are_usage
from zsseg_rt.cli.output import ProgressBar, UserInterrupt, say
from zsseg_rt.fetch.checkpoints import Progress

if TYPE_CHECKING:
    from zsseg_rt.bundles.pretrained import PretrainedSet


@dataclass(frozen=True, kw_only=True)
class _Options:
    size: int | None = opt("Side of the input: 224, 336 or 448. 336 makes NAME-336, and so on.")
    keep_checkpoint: bool = opt("Keep the downloaded weights file.", False, "--keep-checkpoint")
    overwrite: bool = opt("Replace an existing bundle.", False)


@takes_groups
def fetch(
    *,
    name: Annotated[
        str | None,
        typer.Argument(help="Name to fetch, such as sfp-b16; without it, list the names."),
    ] = None,
    how: _Options,
) -> None:
    """Download published weights and make a bundle of them, for --bundle NAME.

    A download that was interrupted goes on where it stopped.
    """
    if name is None:
        _print_names()
        return
    from zsseg_rt.bundles.pretrained import known_set
    from zsseg_rt.fetch import fetch_bundle

    with argument_errors_are_usage():
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
