"""From class names, as a caller gives them, to the phrases that are embedded and back to labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.schema import check_plain_text
from zsseg_rt.errors import VocabularyError
from zsseg_rt.text.tokenizer import clean_text

_MOST_LISTED = 20  # repeated names that an error lists
BACKGROUND = -1
"""Class index of a phrase whose pixels are labelled unknown."""

ClassNames = Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]
"""Classes in order; a class is a name, or a list of synonyms whose first is its name. A mapping has
a class per entry, from its name to its further synonyms: one, or a list, which may be empty."""


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Classes and the phrases that stand for them; immutable."""

    names: tuple[str, ...]  # Class names in the caller's order, length C
    # Every text that is embedded, length P >= C: classes' synonyms, then background
    phrases: tuple[str, ...]
    # int32 [P]: the class of each phrase, BACKGROUND for background
    phrase_classes: npt.NDArray[np.int32]
    # Whether background="auto", given or by default, chose its phrases
    auto_background: bool = False

    @classmethod
    def read(
        cls,
        classes: ClassNames,
        background: Sequence[str] = (),
        *,
        max_phrases: int = 1024,
        meaning: Callable[[str], str] = str.casefold,
    ) -> ClassList:
        """Check class names and lay out their phrases.

        A class takes a phrase of the background over if ``meaning`` is the same for both.
        """
        groups = read_groups(classes)
        _check_list("background", background)
        phrases = [phrase for group in groups for phrase in group]
        _refuse_repeats(phrases)
        meanings, backdrop = set(map(meaning, phrases)), []
        for index, text in enumerate(background):
            phrase = _clean(text, "background", index)
            if meaning(phrase) not in meanings:
                backdrop.append(phrase)
                meanings.add(meaning(phrase))
        phrases += backdrop
        if len(phrases) > max_phrases:
            raise VocabularyError(
                f"class_names: expected at most {max_phrases} phrases (classes, synonyms and "
                f"background together), got {len(phrases)}. Name fewer, or export for more."
            )
        return ClassList.of_groups(groups, backdrop)

    @classmethod
    def of_groups(
        cls, groups: Sequence[Sequence[str]], background: Sequence[str] = ()
    ) -> ClassList:
        """Lay out the phrases of classes that have been checked, as those of data sets are."""
        owners = [index for index, group in enumerate(groups) for _ in group]
        owners += [BACKGROUND] * len(background)
        return ClassList(
            names=tuple(group[0] for group in groups),
            phrases=(*(phrase for group in groups for phrase in group), *background),
            phrase_classes=np.asarray(owners, np.int32),
        )

    @property
    def background(self) -> tuple[str, ...]:
        """The phrases whose pixels are labelled unknown."""
        pairs = zip(self.phrases, self.phrase_classes, strict=True)
        return tuple(phrase for phrase, owner in pairs if owner == BACKGROUND)

    @property
    def is_plain(self) -> bool:
        """True if phrase and class indices are the same thing."""
        return len(self.phrases) == len(self.names)

    def best_of_synonyms(self, phrase_scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The best score of each class's phrases, [C, ...] of [P, ...]; background is left out."""
        first = np.searchsorted(self.phrase_classes[: self._num_named], np.arange(len(self.names)))
        return np.maximum.reduceat(phrase_scores[: self._num_named], first, axis=0)

    @property
    def _num_named(self) -> int:
        """Phrases that belong to a class: they come first, in the order of the classes."""
        return int((self.phrase_classes != BACKGROUND).sum())

    @cached_property
    def label_table(self) -> npt.NDArray[Any]:
        """Map phrase labels to class labels and unknown; uint8, or uint16 above 254 classes."""
        dtype = label_dtype(len(self.names))
        unknown = np.iinfo(dtype).max
        size = np.iinfo(label_dtype(len(self.phrases))).max + 1
        table = np.full(size, unknown, dtype)
        used = self.phrase_classes != BACKGROUND
        table[: len(self.phrases)][used] = self.phrase_classes[used]
        return table

    def seen(self, seen_names: Collection[str]) -> npt.NDArray[np.bool_] | None:
        """Which phrases the tokenizer reads as a class that was seen, bool [P]; None if none."""
        if not seen_names:
            return None
        trained = {clean_text(name) for name in seen_names}
        return np.array([clean_text(phrase) in trained for phrase in self.phrases])


def read_groups(classes: ClassNames) -> list[list[str]]:
    """The phrases of every class, its name first."""
    if isinstance(classes, Mapping):
        groups = [_named(*entry, index) for index, entry in enumerate(classes.items())]
    else:
        _check_list("class_names", classes)
        groups = [_synonyms(entry, index) for index, entry in enumerate(classes)]
    if not groups:
        raise VocabularyError("class_names: expected at least one class, got none")
    return groups


def split_names(text: str) -> list[str]:
    """Read "a, b" without empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_synonyms(class_names: Sequence[str]) -> list[list[str]]:
    """Split each name at its commas: "sofa, couch" becomes two phrases of one class."""
    classes = [split_names(name) for name in class_names]
    for name, phrases in zip(class_names, classes, strict=True):
        if not phrases:
            raise VocabularyError(
                f"class_names: expected a name, got {name!r}. Leave no name empty."
            )
    return classes


def join_synonyms(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The inverse of :func:`split_synonyms`."""
    return tuple(", ".join(phrases) for phrases in classes)


def rename_classes(class_names: Sequence[str], new_names: Mapping[str, str]) -> tuple[str, ...]:
    """Replace names, to ask a model for the same classes in different words."""
    renamed = list(class_names)
    for old, new in new_names.items():
        places = [i for i, name in enumerate(class_names) if old == name]
        places += [i for i, words in enumerate(split_synonyms(class_names)) if old in words]
        if not places:
            raise VocabularyError(
                f"new_names: expected old names from {', '.join(class_names)}, got {old!r}. "
                "Check the spelling."
            )
        renamed[places[0]] = new
    return tuple(renamed)


def _check_list(argument: str, names: Any) -> None:
    """Refuse names without an order, which labels index, and strings, which list letters."""
    if isinstance(names, str):
        raise VocabularyError(
            f"{argument}: expected a list of names, got the string {names!r}. "
            f"Write {split_names(names) or ['NAME']}."
        )
    if isinstance(names, AbstractSet) or not isinstance(names, Iterable):
        raise VocabularyError(
            f"{argument}: expected a list of names, got {type(names).__name__}. "
            "Put the names in a list."
        )


def _synonyms(entry: str | Sequence[str], index: int) -> list[str]:
    if isinstance(entry, str) or not isinstance(entry, Sequence):
        return [_clean(entry, "class_names", index)]
    names = [_clean(text, "class_names", index) for text in entry]
    if not names:
        raise VocabularyError(f"class_names[{index}]: expected at least one synonym, got none")
    return names


def _named(name: Any, synonyms: Any, index: int) -> list[str]:
    """The phrases of a mapping's entry; a synonym that repeats the name is the name."""
    if not isinstance(synonyms, (str, Sequence)):
        raise VocabularyError(
            f"class_names[{name!r}]: expected a synonym or a list of them, got "
            f"{type(synonyms).__name__}. Write [] for a class without synonyms."
        )
    first = _clean(name, "class_names", index)
    further = _synonyms(synonyms, index) if synonyms else []
    return [first, *(phrase for phrase in further if phrase.casefold() != first.casefold())]


def _clean(text: Any, argument: str, index: int) -> str:
    name = check_plain_text(text.strip() if isinstance(text, str) else text, f"{argument}[{index}]")
    if not name:
        raise VocabularyError(f"{argument}[{index}]: expected a name, got an empty string")
    return name


def _refuse_repeats(phrases: Sequence[str]) -> None:
    """Refuse phrases that differ in their case at most: text encoders read them alike."""
    counts = Counter(phrase.casefold() for phrase in phrases)
    repeats = [repr(p) for p in dict.fromkeys(phrases) if counts[p.casefold()] > 1]
    if repeats:
        more = f" and {len(repeats) - _MOST_LISTED} more" if len(repeats) > _MOST_LISTED else ""
        raise VocabularyError(
            "class_names: expected every name once, also apart from case and among synonyms, got "
            f"these again: {', '.join(repeats[:_MOST_LISTED])}{more}. Keep one of each."
        )


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
