"""Prompt templates: the text around a class name when it is embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zsseg_rt.common.schema import check_plain_text
from zsseg_rt.errors import VocabularyError


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Templates for one text input of a bundle.

    Attributes:
        name: What its embeddings are called in :attr:`Vocabulary.prompt_embeds`; ``""`` for the
            first set, which are :attr:`Vocabulary.embeds`.
        templates: Prompts with one ``{}`` each.
        bank: The tensor of the bundle's text bank that holds names embedded with them.
        golden: The array of the golden sample that holds its classes' embeddings.
    """

    name: str = ""
    templates: tuple[str, ...]
    bank: str = "embeds"
    golden: str = "text_embeds"


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return the templates as a tuple after checking them."""
    if isinstance(templates, str) or not isinstance(templates, Iterable):
        raise VocabularyError(f"templates: expected a list of strings, got {templates!r}")
    given = tuple(templates)
    if not given:
        raise VocabularyError(
            "templates: expected at least one, got none. Use ['{}'] for bare names."
        )
    for index, template in enumerate(given):
        if check_plain_text(template, f"templates[{index}]").count("{}") != 1:
            raise VocabularyError(
                f"templates: expected one '{{}}' in each, got {template!r}. "
                "Write e.g. 'a photo of a {}.'"
            )
    return given


def fill(templates: Sequence[str], phrase: str) -> list[str]:
    """Put a phrase into every template."""
    return [template.replace("{}", phrase) for template in templates]


def template_key(templates: Sequence[str]) -> str:
    """A short key that changes with any template."""
    return hashlib.sha256("\0".join(templates).encode()).hexdigest()[:16]
