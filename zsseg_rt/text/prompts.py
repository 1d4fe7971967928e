"""Prompt templates: what is said around a class name before it is embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from zsseg_rt.errors import VocabularyError

__all__ = ["check_templates", "fill", "template_key"]


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return the templates as a tuple after checking them.

    Raises:
        VocabularyError: None given, or one without exactly one ``{}``.
    """
    if isinstance(templates, str):
        raise VocabularyError(f"templates: expected a list of strings, got {templates!r}")
    if not templates:
        raise VocabularyError("templates: expected at least one, got none. Use ['{}'] for none.")
    for template in templates:
        if template.count("{}") != 1:
            raise VocabularyError(
                f"templates: expected one '{{}}' in each, got {template!r}. "
                "Write e.g. 'a photo of a {}.'"
            )
    return tuple(templates)


def fill(templates: Sequence[str], phrase: str) -> list[str]:
    """Put a phrase into every template."""
    return [template.replace("{}", phrase) for template in templates]


def template_key(templates: Sequence[str]) -> str:
    """A short key that changes with any template."""
    return hashlib.sha256("\0".join(templates).encode()).hexdigest()[:16]
