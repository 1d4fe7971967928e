"""What an encoder was trained to see, beside the names that a user gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.concepts import ConceptSpec
from zsseg_rt.text.class_names import ClassList

Rows = npt.NDArray[np.float32]
Embed = Callable[[Sequence[str]], Rows]
_MOST_LISTED = 20
# "animal" has 0.22 with sheep, "vehicle" 0.28 with boat; but "animal" also 0.30 with person.
_STANDS_FOR = 0.2


def remarks_on_concepts(
    spec: ConceptSpec | None, classes: ClassList, embed: Embed, meaning: Callable[[str], str]
) -> list[str]:
    """One for all names that are near nothing the encoder was trained on, one for short ones.

    Args:
        spec: What it was trained on; None: not stated.
        classes: The names.
        embed: Gives rows float32 [n, D] of phrases.
        meaning: Gives the name that a phrase stands for.
    """
    if spec is None:
        return []
    known = {*spec.names, *spec.also}
    asked = [
        phrase
        for phrase in dict.fromkeys(_asked(classes))
        if phrase not in spec.background and not {phrase, meaning(phrase)} & known
    ]
    remarks = []
    short = [repr(phrase) for phrase in asked if len(phrase.split()) < spec.least_words]
    if short:
        remarks.append(
            f"class_names: {_listed(short)}: this model was trained on phrases of at least "
            f"{spec.least_words} words and takes a shorter one for many things. Its phrases: "
            f"{', '.join(spec.names)}."
        )
    far = _far(spec, asked, embed, meaning) if spec.least_cosine is not None and asked else []
    if far:
        remarks.append(
            f"class_names: {_listed(far)}: this model was trained to see {len(spec.names)} "
            f"things and none of these. It sees: {', '.join(spec.names)}. For any words, fetch a "
            "CLIP bundle: zsseg-rt fetch sfp-b16."
        )
    return remarks


def remarks_on_shared_rows(
    classes: ClassList, own: Collection[str], meaning: Callable[[str], str]
) -> Iterator[str]:
    """One for each name of the bank that several classes are looked for as."""
    asked: dict[str, dict[int, str]] = {}
    for phrase, owner in zip(classes.phrases, classes.phrase_classes.tolist(), strict=True):
        if owner >= 0 and phrase not in own:
            asked.setdefault(meaning(phrase), {}).setdefault(owner, phrase)
    for name, phrases in asked.items():
        if len(phrases) > 1:
            yield (
                f"class_names: {_listed(list(map(repr, phrases.values())))}: this model looks for "
                f"each of them as {name!r}, and the first takes the pixels of all."
            )


def unnamed(
    spec: ConceptSpec, classes: ClassList, embed: Embed, meaning: Callable[[str], str]
) -> list[str]:
    """The things that no class stands for, so that none is painted with the name of another.

    A class that is called as a thing stands for this thing alone. Any other phrase stands for all
    things that are nearer to it than to other phrases, by a cosine of at least 0.2.
    """
    if spec.least_cosine is None:
        return []
    called = {meaning(phrase): phrase for phrase in _asked(classes)}
    things = {meaning(name): name for name in spec.names}
    rest = [name for key, name in things.items() if key not in called]
    if not rest or not called.keys() - things.keys():
        return rest
    cosines = _unit(embed(rest)) @ _unit(embed(list(called.values()))).T
    is_thing = np.array([key in things for key in called])
    alone = is_thing[cosines.argmax(1)] | (cosines.max(1) < _STANDS_FOR)
    return [name for name, nobodys in zip(rest, alone, strict=True) if nobodys]


def _asked(classes: ClassList) -> list[str]:
    """The phrases without those of the background."""
    owners = classes.phrase_classes.tolist()
    return [p for p, owner in zip(classes.phrases, owners, strict=True) if owner >= 0]


def _listed(phrases: Sequence[str]) -> str:
    more = len(phrases) - _MOST_LISTED
    return ", ".join(phrases[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _far(
    spec: ConceptSpec, asked: Sequence[str], embed: Embed, meaning: Callable[[str], str]
) -> list[str]:
    """Phrases that are near no concept, each with the nearest, or with what it takes."""
    assert spec.least_cosine is not None
    cosines = _unit(embed(asked)) @ _unit(embed(spec.names)).T
    return [
        f"{phrase!r} (as background, all else)"
        if meaning(phrase) in spec.background
        else f"{phrase!r} (nearest: {spec.names[int(row.argmax())]})"
        for phrase, row in zip(asked, cosines, strict=True)
        if row.max() < spec.least_cosine
    ]


def _unit(rows: Rows) -> Rows:
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
