"""The classes an engine looks for: names, phrases and embeddings that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.schema import check_plain_text
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError, VocabularyError
from zsseg_rt.text.class_names import Background, ClassList


@dataclass(frozen=True, kw_only=True)
class Vocabulary(ClassList):
    """Names, the phrases that stand for them, and one embedding per phrase; immutable.

    See :class:`ClassList` for names and phrases.
    """

    embeds: npt.NDArray[np.float32]  # float32 [P, D], one row per phrase, read-only
    version: int  # Grows with every vocabulary an engine is given; stamped on every result
    # The same phrases embedded with further prompt sets, read-only, by the set's name; empty where
    # a bundle has one set
    prompt_embeds: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    # Sentences about names that may not mean what the caller meant; nothing is refused for them
    remarks: tuple[str, ...] = ()
    # The text space of the bundle that embedded the phrases; "" if that is not known, as with
    # embeddings of the caller's own
    space: str = ""

    def __post_init__(self) -> None:
        check_embeddings(self.embeds, len(self.phrases), self.embeds.shape[-1])
        for rows in self.prompt_embeds.values():
            check_embeddings(rows, *self.embeds.shape)
            rows.setflags(write=False)
        self.embeds.setflags(write=False)
        self.phrase_classes.setflags(write=False)


def check_embeddings(embeds: npt.NDArray[Any], count: int, embed_dim: int) -> None:
    """Check given embeddings: float32 [count, embed_dim], finite, of usable norms."""
    if not isinstance(embeds, np.ndarray) or embeds.dtype != np.float32:
        kind = getattr(embeds, "dtype", type(embeds).__name__)
        raise DTypeError(
            f"embeddings: expected a float32 NumPy array, got {kind}. Use .astype(np.float32)."
        )
    if embeds.shape != (count, embed_dim):
        raise ShapeError(
            f"embeddings: expected shape ({count}, {embed_dim}), a row per phrase in the bundle's "
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


def refuse_beside_vocabulary(
    embeddings: Any, background: Background, templates: Sequence[str] | None
) -> None:
    """Refuse what a vocabulary already has."""
    arguments = {"embeddings": embeddings, "background": background or None, "templates": templates}
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(
                f"{name}: expected None beside a Vocabulary, which has its own. Give the class "
                "names instead, or the Vocabulary alone."
            )


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Templates for one text input of a bundle."""

    # What its embeddings are called in prompt_embeds; "" for the first set, which are embeds
    name: str = ""
    templates: tuple[str, ...]  # Prompts with one {} each
    bank: str = "embeds"  # The tensor of the bundle's text bank that holds names embedded with them
    golden: str = "text_embeds"  # The array of the golden sample that holds its classes' embeddings


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return the templates as a tuple after checking them."""
    if isinstance(templates, str) or not isinstance(templates, Iterable):
        raise VocabularyError(f"templates: expected a list of strings, got {templates!r}")
    texts = tuple(templates)
    if not texts:
        raise VocabularyError(
            "templates: expected at least one, got none. Use ['{}'] for bare names."
        )
    for index, template in enumerate(texts):
        if check_plain_text(template, f"templates[{index}]").count("{}") != 1:
            raise VocabularyError(
                f"templates: expected one '{{}}' in each, got {template!r}. "
                "Write e.g. 'a photo of a {}.'"
            )
    return texts


def fill(templates: Sequence[str], phrase: str) -> list[str]:
    """Put a phrase into every template."""
    return [template.replace("{}", phrase) for template in templates]


def template_key(templates: Sequence[str]) -> str:
    """A short key that changes with any template."""
    return hashlib.sha256("\0".join(templates).encode()).hexdigest()[:16]
