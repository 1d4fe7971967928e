"""Phrases for what surrounds the things people look for, so that one class need not win all of it.

Source: the background of the VOC and COCO-Object class lists in Wang et al., "SCLIP: Rethinking
Self-Attention for Dense Vision-Language Inference", ECCV 2024.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from zsseg_rt.errors import VocabularyError
from zsseg_rt.text.class_names import ClassNames, read_groups, split_names
from zsseg_rt.text.tokenizer import clean_text

AUTO, NONE = "auto", "none"
Background = Sequence[str] | None
"""Phrases; ``"auto"``, which chooses them, or ``"none"``; None: auto if the bundle has its own."""

FEW_CLASSES = 3
"""Up to so many classes, the command line adds background phrases unless told otherwise."""

BACKGROUND_PHRASES = (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk",
    "bed", "building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf",
    "curtain", "stair", "floor", "hill", "rail", "fence",
)  # fmt: skip


def read_background(
    background: Sequence[str], classes: ClassNames, can_embed: Callable[[str], bool],
    own: Sequence[str] = (),
) -> Sequence[str]:  # fmt: skip
    """Return the background phrases that a caller means; ``own`` replaces the published ones."""
    if not isinstance(background, str):
        return background
    if background == NONE:
        return ()
    if background != AUTO:
        raise VocabularyError(
            f"background: expected a list of names or 'auto', got the string {background!r}. "
            f"Write {split_names(background)}; [] leaves it out."
        )
    named = {word for group in read_groups(classes) for phrase in group for word in _words(phrase)}
    return [p for p in own or BACKGROUND_PHRASES if not named & _words(p) and can_embed(p)]


def _words(phrase: str) -> set[str]:
    """The words of a phrase, without the ending of their plural."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", clean_text(phrase))}
