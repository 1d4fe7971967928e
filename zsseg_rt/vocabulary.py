"""The classes an engine looks for: names, phrases and embeddings that never change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import DTypeError, ShapeError, VocabularyError

__all__ = ["BACKGROUND", "ClassNames", "Vocabulary", "read_class_specs"]

BACKGROUND = -1
"""Class index of a phrase whose pixels are labelled unknown."""

ClassNames = Sequence[str | Sequence[str]]
"""Classes in order; a class is a name, or a list of synonyms whose first is its name."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Names, the phrases that stand for them, and one embedding a phrase; immutable.

    Attributes:
        names: Class names in the caller's order, length C.
        phrases: Every text that was embedded, length P >= C: classes' synonyms, then background.
        phrase_classes: int32 [P]: the class of each phrase, :data:`BACKGROUND` for background.
        embeds: float32 [P, D], one row a phrase, read-only.
        version: Grows with every vocabulary an engine was given; stamped on every result.
        region_embeds: float32 [P, D], the same phrases embedded with the prompts of a bundle's
            second network, read-only; None in bundles without one.
    """

    names: tuple[str, ...]
    phrases: tuple[str, ...]
    phrase_classes: npt.NDArray[np.int32]
    embeds: npt.NDArray[np.float32]
    version: int
    region_embeds: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        check_embeddings(self.embeds, len(self.phrases), self.embeds.shape[-1])
        for array in (self.embeds, self.phrase_classes):
            array.setflags(write=False)
        if self.region_embeds is not None:
            check_embeddings(self.region_embeds, *self.embeds.shape)
            self.region_embeds.setflags(write=False)

    @property
    def is_plain(self) -> bool:
        """True if phrase and class indices are the same thing."""
        return len(self.phrases) == len(self.names)

    @cached_property
    def label_table(self) -> npt.NDArray[Any]:
        """Map phrase labels to class labels, unknown included; uint8, uint16 above 254 classes."""
        dtype = np.uint8 if len(self.names) <= 254 else np.uint16
        unknown = np.iinfo(dtype).max
        size = 256 if len(self.phrases) <= 254 else 65536
        table = np.full(size, unknown, dtype)
        used = self.phrase_classes != BACKGROUND
        table[: len(self.phrases)][used] = self.phrase_classes[used]
        return table


@dataclass(frozen=True, kw_only=True)
class ClassSpecs:
    """Class names resolved to phrases, before anything is embedded."""

    names: tuple[str, ...]
    phrases: tuple[str, ...]
    phrase_classes: npt.NDArray[np.int32]


def read_class_specs(
    classes: ClassNames, background: Sequence[str] = (), *, max_phrases: int = 1024
) -> ClassSpecs:
    """Check class names and lay out their phrases.

    Args:
        classes: One entry a class, a name or a list of synonyms.
        background: Phrases that compete with the classes; pixels they win become unknown.
        max_phrases: The most phrases the graphs accept.

    Raises:
        VocabularyError: No class, an empty or repeated name, or too many phrases.
    """
    _check_list("class_names", classes)
    _check_list("background", background)
    groups = [_synonyms(entry, index) for index, entry in enumerate(classes)]
    if not groups:
        raise VocabularyError("class_names: expected at least one class, got none")
    backdrop = [_clean(text, "background", i) for i, text in enumerate(background)]
    phrases = [phrase for group in groups for phrase in group] + backdrop
    _refuse_repeats(phrases)
    if len(phrases) > max_phrases:
        raise VocabularyError(
            f"class_names: expected at most {max_phrases} phrases (classes, synonyms and "
            f"background together), got {len(phrases)}. Name fewer, or export for more."
        )
    indices = [index for index, group in enumerate(groups) for _ in group]
    indices += [BACKGROUND] * len(backdrop)
    return ClassSpecs(
        names=tuple(group[0] for group in groups),
        phrases=tuple(phrases),
        phrase_classes=np.asarray(indices, np.int32),
    )


def check_embeddings(embeds: npt.NDArray[Any], count: int, embed_dim: int) -> None:
    """Check given embeddings: float32 [count, embed_dim], finite, of usable norms.

    Raises:
        DTypeError: Not float32.
        ShapeError: Another shape.
        VocabularyError: NaN, infinity, a row of zeros or of a norm that float32 products cannot
            hold; the message names the first row.
    """
    if not isinstance(embeds, np.ndarray) or embeds.dtype != np.float32:
        found = getattr(embeds, "dtype", type(embeds).__name__)
        raise DTypeError(
            f"embeddings: expected a float32 NumPy array, got {found}. Use .astype(np.float32)."
        )
    if embeds.shape != (count, embed_dim):
        raise ShapeError(
            f"embeddings: expected shape ({count}, {embed_dim}), one row a phrase in the bundle's "
            f"text space, got {embeds.shape}"
        )
    bad = ~np.isfinite(embeds).all(axis=1)
    if bad.any():
        raise VocabularyError(
            f"embeddings: expected finite numbers, got NaN or infinity in row {int(np.argmax(bad))}"
        )
    norms = np.linalg.norm(embeds.astype(np.float64), axis=1)
    odd = (norms < 1e-12) | (norms > 1e12)
    if odd.any():
        row = int(np.argmax(odd))
        raise VocabularyError(
            f"embeddings: expected rows whose norm is from 1e-12 to 1e12, got {norms[row]:g} in "
            f"row {row}. Text embeddings have norms around 1."
        )


def _check_list(argument: str, names: Any) -> None:
    """Labels are indices into the names, so these need an order; a string is a list of letters."""
    if isinstance(names, str):
        raise VocabularyError(
            f"{argument}: expected a list of names, got the string {names!r}. Write [{names!r}]."
        )
    if isinstance(names, AbstractSet) or not isinstance(names, Iterable):
        raise VocabularyError(
            f"{argument}: expected a list of names, got {type(names).__name__}. "
            "Put the names in an order."
        )


def _synonyms(entry: str | Sequence[str], index: int) -> list[str]:
    if isinstance(entry, str) or not isinstance(entry, Sequence):
        return [_clean(entry, "class_names", index)]
    names = [_clean(text, "class_names", index) for text in entry]
    if not names:
        raise VocabularyError(f"class_names[{index}]: expected at least one synonym, got none")
    return names


def _clean(text: Any, argument: str, index: int) -> str:
    if not isinstance(text, str):
        raise VocabularyError(
            f"{argument}[{index}]: expected a string, got {type(text).__name__} {text!r}"
        )
    name = text.strip()
    if not name:
        raise VocabularyError(f"{argument}[{index}]: expected a name, got an empty string")
    return name


def _refuse_repeats(phrases: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for index, phrase in enumerate(phrases):
        first = seen.setdefault(phrase, index)
        if first != index:
            raise VocabularyError(
                f"class_names: expected every name once, got {phrase!r} at places {first} and "
                f"{index}. Remove one."
            )
