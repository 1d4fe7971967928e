"""From what the caller of ``Engine.set_classes`` gives to a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundle import Bundle
from zsseg_rt.text.background import read_background
from zsseg_rt.text.class_names import ClassList, ClassNames
from zsseg_rt.text.embeddings import PhraseEmbedder, read_embeddings
from zsseg_rt.text.prompts import PromptSet, check_templates
from zsseg_rt.text.vocabulary import Vocabulary, check_vocabulary, refuse_beside_vocabulary

__all__ = ["VocabularyMaker"]


class VocabularyMaker:
    """Makes the vocabularies of one bundle, one at a time."""

    def __init__(
        self, bundle: Bundle, prompt_sets: Sequence[PromptSet], embedder: PhraseEmbedder
    ) -> None:
        self._bundle, self._prompt_sets, self._embedder = bundle, prompt_sets, embedder

    def make(
        self,
        class_names: ClassNames | Vocabulary,
        *,
        embeddings: npt.NDArray[np.float32] | None,
        background: Sequence[str] | Literal["auto"],
        templates: Sequence[str] | None,
    ) -> Vocabulary:
        """See :meth:`zsseg_rt.Engine.set_classes`; one that is given has the version it had."""
        most = self._bundle.head.max_classes
        if isinstance(class_names, Vocabulary):
            refuse_beside_vocabulary(embeddings, background, templates)
            check_vocabulary(
                class_names,
                embed_dim=self._bundle.text.embed_dim,
                max_phrases=most,
                prompt_sets=[prompt_set.name for prompt_set in self._prompt_sets[1:]],
            )
            return class_names
        known = partial(self._embedder.can_embed, with_bank=templates is None)
        backdrop = read_background(background, class_names, known)
        classes = ClassList.read(class_names, backdrop, max_phrases=most)
        if embeddings is not None:
            return self.from_rows(classes, embeddings)
        chosen = None if templates is None else check_templates(templates)
        return self._of(
            classes,
            [
                self._embedder.embed(classes.phrases, chosen, prompt_set=prompt_set)
                for prompt_set in self._prompt_sets
            ],
        )

    def from_rows(self, classes: ClassList, embeddings: npt.NDArray[np.float32]) -> Vocabulary:
        """A vocabulary with these embeddings, checked."""
        count, width = len(classes.phrases), self._bundle.text.embed_dim
        return self._of(classes, read_embeddings(embeddings, count, width, len(self._prompt_sets)))

    def _of(self, classes: ClassList, embeds: Sequence[npt.NDArray[np.float32]]) -> Vocabulary:
        further = zip(self._prompt_sets[1:], embeds[1:], strict=True)
        return Vocabulary(
            names=classes.names,
            phrases=classes.phrases,
            phrase_classes=classes.phrase_classes,
            embeds=embeds[0],
            version=0,
            prompt_embeds={prompt_set.name: rows for prompt_set, rows in further},
        )
