"""Class names with synonyms, as data sets write them: ``"sofa, couch"`` is one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zsseg_rt.errors import VocabularyError

__all__ = ["join_synonyms", "rename_classes", "split_synonyms"]


def split_synonyms(class_names: Sequence[str]) -> list[list[str]]:
    """Split each name at its commas.

    Raises:
        VocabularyError: A name holds no word.

    Example:
        >>> split_synonyms(["sky", "sofa, couch"])
        [['sky'], ['sofa', 'couch']]
    """
    classes = [[part.strip() for part in name.split(",") if part.strip()] for name in class_names]
    for name, phrases in zip(class_names, classes, strict=True):
        if not phrases:
            raise VocabularyError(f"class_names: expected a name, got {name!r}. Leave none empty.")
    return classes


def join_synonyms(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The inverse of :func:`split_synonyms`."""
    return tuple(", ".join(phrases) for phrases in classes)


def rename_classes(class_names: Sequence[str], new_names: Mapping[str, str]) -> tuple[str, ...]:
    """Replace names, to ask a model for the same classes in other words.

    Args:
        class_names: The data set's names.
        new_names: New phrase by old name, which is a whole name or one of its synonyms; commas
            separate synonyms in new phrases.

    Returns:
        As many names in the same order.

    Raises:
        VocabularyError: An old name is not there.

    Example:
        >>> rename_classes(["car", "tree, bush"], {"car": "automobile", "tree": "oak, elm"})
        ('automobile', 'oak, elm')
    """
    renamed = list(class_names)
    for old, new in new_names.items():
        places = [i for i, name in enumerate(class_names) if old == name]
        places += [i for i, words in enumerate(split_synonyms(class_names)) if old in words]
        if not places:
            raise VocabularyError(
                f"new_names: expected old names out of {', '.join(class_names)}, got {old!r}. "
                "Check the spelling."
            )
        renamed[places[0]] = new
    return tuple(renamed)
