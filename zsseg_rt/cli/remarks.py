"""What commands say unasked, where results are easily misread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zsseg_rt.cli.output import say

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine
    from zsseg_rt.integrations.batch import PhotoResult

NEARLY_ALL = 0.98
"""A class with this share of a picture is remarked upon."""


def print_background(engine: Engine, given: str) -> None:
    """Tell which background phrases were added, unless the caller wrote them out."""
    vocabulary = engine.vocabulary
    if vocabulary is None or not vocabulary.auto_background:
        return
    why = "asked for by --background auto" if given else f"added to {len(vocabulary.names)} class"
    why += "es" if not given and len(vocabulary.names) > 1 else ""
    if vocabulary.background:
        say(
            f"background ({why}): {', '.join(vocabulary.background)}. Pixels that they win are "
            "unknown; --background none leaves them out, --background 'a,b' takes others."
        )
    elif given:
        say("background: none of the published phrases fits this bundle and these classes")


def print_if_photographs(engine: Engine, photos: list[str] | None) -> None:
    """Warn that the scenes model knows only drawings, if the pictures are others."""
    from zsseg_rt.demo import demo_bundle, demo_photos

    if engine.bundle.path != demo_bundle("scenes") or not photos:
        return
    if set(photos) <= set(demo_photos("scenes")):
        return
    say(
        "The model that ships knows only drawings of a made-up world: its labels of photographs "
        "mean nothing. Take --demo without scenes, or see README, section Your own photos."
    )


def remark_on(result: PhotoResult) -> str:
    """One line about a picture that one class, or none, has nearly all of; otherwise empty."""
    if result.unknown_share >= NEARLY_ALL:
        return (
            "remark: nearly every pixel is unknown. Name what is in the picture, or leave out "
            "background phrases (--background none) and --unknown-below."
        )
    if result.classes and result.classes[0]["share"] >= NEARLY_ALL:
        top = result.classes[0]
        return (
            f"remark: {top['name']!r} takes {top['share']:.1%} of the picture. Every pixel takes "
            "the best of the phrases it is given: name more classes, or what else is in the "
            "picture with --background 'a,b'."
        )
    return ""
