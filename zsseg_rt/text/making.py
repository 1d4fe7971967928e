"""Make a bundle's vocabularies: from names alone, or with embeddings that are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import ConceptSpec
from zsseg_rt.text.class_names import AUTO, Background, ClassList, ClassNames, read_background
from zsseg_rt.text.embeddings import PhraseEmbedder, read_embeddings, unit_rows
from zsseg_rt.text.vocabulary import PromptSet, Vocabulary, check_templates, check_vocabulary

_log = logging.getLogger(__name__)


class VocabularyMaker:
    """Makes vocabularies of version 0; the text encoder is loaded at the first phrase it needs."""

    def __init__(
        self,
        bundle: Bundle,
        prompt_sets: Sequence[PromptSet],
        load_encoder: Callable[[], Session],
        *,
        cache_dir: Path | None,
        keep_encoder: bool,
    ) -> None:
        self._bundle, self._prompt_sets, self._keep_encoder = bundle, prompt_sets, keep_encoder
        self._embedder = PhraseEmbedder(bundle, load_encoder, cache_dir)
        self.release_encoder = self._embedder.release_encoder

    def check(self, vocabulary: Vocabulary) -> None:
        """Refuse a vocabulary that this bundle has no use for."""
        check_vocabulary(
            vocabulary,
            embed_dim=self._bundle.text.embed_dim,
            max_phrases=self._bundle.head.max_classes,
            prompt_sets=[prompt_set.name for prompt_set in self._prompt_sets[1:]],
            space=self._bundle.text.space,
        )

    def read(
        self,
        class_names: ClassNames,
        background: Background,
        templates: Sequence[str] | None,
    ) -> ClassList:
        """The classes and their phrases, background included."""
        can_embed = partial(self._embedder.can_embed, with_bank=templates is None)
        concepts, meaning = self._bundle.concepts, self._embedder.meaning
        own = () if concepts is None else concepts.background
        if background is None:
            background = AUTO if own else ()
        read = partial(ClassList.read, max_phrases=self._bundle.head.max_classes, meaning=meaning)
        backdrop = read_background(background, class_names, can_embed, own)
        classes = read(class_names, backdrop)
        if background != AUTO:
            return classes
        if concepts is not None and own and backdrop:
            things = unnamed(concepts, classes, self._embedder.embed, meaning)
            classes = read(class_names, [*backdrop, *things])
        return replace(classes, auto_background=True)

    def embed(self, classes: ClassList, templates: Sequence[str] | None) -> Vocabulary:
        """A vocabulary whose phrases the bundle embeds."""
        templates = None if templates is None else check_templates(templates)
        embeds = [
            self._embedder.embed(classes.phrases, templates, prompt_set=prompt_set)
            for prompt_set in self._prompt_sets
        ]
        further = remarks_on_concepts(
            self._bundle.concepts, classes, self._embedder.embed, self._embedder.meaning
        )
        if not self._keep_encoder:
            self._embedder.release_encoder()
        return self._made(classes, embeds, further, self._bundle.text.space)

    def with_embeddings(
        self, classes: ClassList, embeddings: npt.NDArray[np.float32]
    ) -> Vocabulary:
        """A vocabulary with embeddings of the caller's own."""
        sets, embed_dim = len(self._prompt_sets), self._bundle.text.embed_dim
        return self._made(
            classes, read_embeddings(embeddings, len(classes.phrases), embed_dim, sets)
        )

    def _made(
        self,
        classes: ClassList,
        embeds: Sequence[npt.NDArray[np.float32]],
        remarks: Sequence[str] = (),
        space: str = "",
    ) -> Vocabulary:
        further = zip(self._prompt_sets[1:], embeds[1:], strict=True)
        texts = [p for p in classes.phrases if not self._embedder.banks(p)]
        shared = remarks_on_shared_rows(classes, set(texts), self._embedder.meaning)
        remarks = (*_remarks_on_commas(texts), *shared, *remarks)
        for remark in remarks:
            _log.warning("%s", remark)
        return Vocabulary(
            names=classes.names,
            phrases=classes.phrases,
            phrase_classes=classes.phrase_classes,
            auto_background=classes.auto_background,
            embeds=embeds[0],
            version=0,
            prompt_embeds={prompt_set.name: rows for prompt_set, rows in further},
            remarks=remarks,
            space=space,
        )


def _remarks_on_commas(phrases: Iterable[str]) -> tuple[str, ...]:
    """One for each text that may have been meant as several names."""
    return tuple(
        f"class_names: {phrase!r} is one name with a comma in it. Write each class or synonym "
        f"as its own text: {[part.strip() for part in phrase.split(',') if part.strip()]}."
        for phrase in phrases
        if phrase.strip(" ,").count(",")
    )


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
    trained = {*spec.names, *spec.also}
    asked = [
        phrase
        for phrase in dict.fromkeys(_asked(classes))
        if phrase not in spec.background and not {phrase, meaning(phrase)} & trained
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
    cosines = unit_rows(embed(rest)) @ unit_rows(embed(list(called.values()))).T
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
    cosines = unit_rows(embed(asked)) @ unit_rows(embed(spec.names)).T
    return [
        f"{phrase!r} (as background, all else)"
        if meaning(phrase) in spec.background
        else f"{phrase!r} (nearest: {spec.names[int(row.argmax())]})"
        for phrase, row in zip(asked, cosines, strict=True)
        if row.max() < spec.least_cosine
    ]
