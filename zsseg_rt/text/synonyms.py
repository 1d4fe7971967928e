"""Other words for the names of a text bank: plurals, other spellings, synonyms.

A bank has rows for its own names and no text encoder for others, so a word counts as the name that
means the same: ``motorbike`` as ``motorcycle``, ``dining-tables`` as ``dining table``. The table is
``synonyms.txt``.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator
from pathlib import Path

_CLOSE = 0.75  # of difflib; below, suggestions are rarely what was meant
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"))


class BankNames:
    """Finds the name of a bank that a phrase stands for.

    Args:
        names: The bank's; of two that differ in capitals and gaps only, the first counts.
        folds: Whether plurals and synonyms count, too; else capitals and spaces alone.
    """

    def __init__(self, names: Collection[str], *, folds: bool) -> None:
        self.names = tuple(names)
        self._exact = frozenset(names)
        self._plain = {plain(name): name for name in reversed(self.names)}
        self._keys = {_key(name): name for name in reversed(self.names)} if folds else {}

    def find(self, phrase: str) -> str | None:
        """The bank's name for a phrase; None if it has none."""
        if phrase in self._exact:
            return phrase
        name = self._plain.get(plain(phrase))
        if name is not None or not self._keys:
            return name
        table = _table()
        keys = (key for form in _forms(phrase) for key in (_key(form), *table.get(_key(form), ())))
        return next((self._keys[key] for key in keys if key in self._keys), None)

    def spelt_like(self, phrase: str, most: int) -> list[str]:
        """Names that are spelt like a phrase, or that have a synonym that is; the nearest first."""
        words = [*self._plain, *(_table() if self._keys else ())]
        close = difflib.get_close_matches(plain(phrase), words, n=most, cutoff=_CLOSE)
        found = (self.find(word) for word in close)
        return list(dict.fromkeys(name for name in found if name is not None))


def plain(name: str) -> str:
    """A name in small letters, with one space between words."""
    return " ".join(name.casefold().split())


def _forms(phrase: str) -> Iterator[str]:
    """The phrase, its singular and its plural; then those of what stands before a hyphen."""
    yield phrase
    yield from (phrase[: -len(old)] + new for old, new in _ENDINGS if phrase.lower().endswith(old))
    yield phrase + "s"
    head, hyphen, _ = phrase.partition("-")  # COCO-Stuff's wall-brick, building-other
    if hyphen and head:
        yield from _forms(head)


def _key(name: str) -> str:
    """The letters and digits of a name: ``tv-monitor`` and ``TV monitor`` are ``tvmonitor``."""
    return re.sub(r"[\W_]+", "", name.casefold())


@functools.cache
def _table() -> dict[str, tuple[str, ...]]:
    """For the key of each word, those of the names that it stands for, the nearest first."""
    found: dict[str, tuple[str, ...]] = {}
    text = Path(__file__).with_name("synonyms.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        same, _, narrower = line.partition(":")
        if line.startswith("#"):
            continue
        keys = tuple(map(_key, same.split("=")))
        for word in (*keys, *map(_key, narrower.split(","))):
            found[word] = found.get(word, ()) + keys
    found.pop("", None)
    return found
