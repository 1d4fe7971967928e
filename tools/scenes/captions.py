"""Phrases about scenes, as people would write below an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.scenes.words import GROUNDS, Kind

# The words of captions besides the words of the world; a test keeps this complete.
FUNCTION_WORDS: tuple[str, ...] = (
    *("a", "an", "the", "photo", "picture", "of", "this", "there", "is", "and", "next", "to"),
    *("with", "left", "right", "in", "front", "on", "under", "."),
)


@dataclass(frozen=True)
class Seen:
    """Something that an image visibly shows.

    Attributes:
        kind: What it is.
        pixels: How much of it is visible.
        centre_xy: Mean position of its visible pixels.
    """

    kind: Kind
    pixels: int
    centre_xy: tuple[float, float]


_ONE: tuple[str, ...] = (
    "{}",
    "{}",
    "{a}",
    "a photo of {a}.",
    "a photo of {a}.",
    "a photo of a {}.",
)
_ONE += ("a photo of a {}.", "a picture of {a}", "this is {a}", "there is {a}")
_MASS = ("grass", "sand", "water")


def with_article(name: str) -> str:
    """``"an orange cone"``, ``"a red brick wall"``, ``"the blue sky"``, ``"green grass"``."""
    noun = name.split()[-1]
    if noun in _MASS:
        return name
    article = "the" if noun == "sky" else "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def describe_one(kind: Kind, rng: np.random.Generator) -> str:
    """A caption about one thing or stretch; now and then a word is left out."""
    name = _short_name(kind, rng) if rng.random() < 0.15 else kind.name
    template = _ONE[rng.integers(len(_ONE))]
    return template.replace("{a}", with_article(name)).replace("{}", name)


def describe_scene(seen: Sequence[Seen], rng: np.random.Generator) -> str:
    """A caption about a scene: some of its things, where they are, and what is around them."""
    things = [part for part in seen if part.kind.is_thing]
    stuff = [part for part in seen if not part.kind.is_thing]
    if not things:
        return _describe_stuff(stuff, rng)
    order = rng.permutation(len(things))[: 1 + int(rng.random() < 0.6)]
    shown = [things[index] for index in order]
    text = _relate(shown, rng)
    if stuff and (len(shown) == 1 or rng.random() < 0.5):
        around = stuff[rng.integers(len(stuff))].kind
        text = f"{text} {_preposition(around)} {with_article(around.name)}"
    return text


def _short_name(kind: Kind, rng: np.random.Generator) -> str:
    kept = (Kind("", kind.surface, kind.noun), Kind(kind.colour, "", kind.noun))
    return kept[rng.integers(2)].name


def _describe_stuff(stuff: Sequence[Seen], rng: np.random.Generator) -> str:
    if not stuff:
        return "nothing"
    names = [with_article(stuff[index].kind.name) for index in rng.permutation(len(stuff))[:2]]
    return " and ".join(names)


def _relate(shown: Sequence[Seen], rng: np.random.Generator) -> str:
    first = with_article(shown[0].kind.name)
    if len(shown) == 1:
        return first
    second = with_article(shown[1].kind.name)
    apart = shown[0].centre_xy[0] - shown[1].centre_xy[0]
    if abs(apart) > 24 and rng.random() < 0.5:
        return f"{first} to the {'right' if apart > 0 else 'left'} of {second}"
    return f"{first} {('and', 'next to', 'with')[rng.integers(3)]} {second}"


def _preposition(kind: Kind) -> str:
    if kind.noun in GROUNDS:
        return "on"
    return "under" if kind.noun == "sky" else "in front of"
