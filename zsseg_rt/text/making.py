"""Make a bundle's vocabularies: from names alone, or with embeddings that are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.text.background import AUTO, Background, read_background
from zsseg_rt.text.class_names import ClassList, ClassNames
from zsseg_rt.text.concepts import remarks_on_concepts, remarks_on_shared_rows, unnamed
from zsseg_rt.text.embeddings import PhraseEmbedder, read_embeddings
from zsseg_rt.text.prompts import PromptSet, check_templates
from zsseg_rt.text.vocabulary import Vocabulary, check_vocabulary

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
        known = partial(self._embedder.can_embed, with_bank=templates is None)
        concepts, meaning = self._bundle.concepts, self._embedder.meaning
        own = () if concepts is None else concepts.background
        if background is None:
            background = AUTO if own else ()
        read = partial(ClassList.read, max_phrases=self._bundle.head.max_classes, meaning=meaning)
        backdrop = read_background(background, class_names, known, own)
        classes = read(class_names, backdrop)
        if background != AUTO:
            return classes
        if concepts is not None and own and backdrop:
            things = unnamed(concepts, classes, self._embedder.embed, meaning)
            classes = read(class_names, [*backdrop, *things])
        return replace(classes, auto_background=True)

    def embed(self, classes: ClassList, templates: Sequence[str] | None) -> Vocabulary:
        """A vocabulary whose phrases the bundle embeds."""
        chosen = None if templates is None else check_templates(templates)
        embeds = [
            self._embedder.embed(classes.phrases, chosen, prompt_set=prompt_set)
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
