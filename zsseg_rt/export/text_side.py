"""The text side of a bundle: its text tower, its tokenizer, and what they make of class names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zsseg_rt.bundle import FileEntry, GraphEntry, TextSpec
from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export.golden import unit_rows
from zsseg_rt.export.tokenizer_json import tokenizer_json
from zsseg_rt.export.word_subset import WordSubset
from zsseg_rt.models.text_encoder import average_templates
from zsseg_rt.text.prompts import check_templates, fill
from zsseg_rt.text.tokenizer import Tokenizer

__all__ = ["TextEncoderChoice", "TextSide", "seen_names"]

_log = logging.getLogger(__name__)

TextEncoderChoice = nn.Module | Literal["auto"] | None

_CLIP_VOCAB = 49408
_PROMPTS_PER_RUN = 64
_KEPT_PROMPTS = 16  # in the golden sample: enough to compare the exported graph


class TextSide:
    """Text tower, tokenizer and templates of one export.

    Args:
        model: Its ``text_encoder`` is what ``"auto"`` takes.
        choice: ``"auto"`` takes the model's tower if it has CLIP's vocabulary; a module is used
            instead; None is no tower.
        templates: Prompts with one ``{}`` each.
        subset: A tower with some words only, which is used instead.

    Attributes:
        encoder: The text tower, or None.
        templates: The prompts.

    Raises:
        CheckpointError: The module given has another vocabulary than CLIP's.
        VocabularyError: The templates are unusable.
    """

    def __init__(
        self,
        model: Any,
        choice: TextEncoderChoice,
        templates: Sequence[str],
        subset: WordSubset | None = None,
    ) -> None:
        self.templates = check_templates(templates)
        self.subset = subset
        self.encoder = subset.encoder if subset else _choose_encoder(model, choice)
        self._tokenizer: Tokenizer | None = None

    @property
    def context_length(self) -> int:
        """Tokens a prompt."""
        if self.encoder is None:
            return 77
        config: Any = self.encoder.config
        return int(config.context_length)

    def write_tokenizer(self, folder: Path) -> FileEntry | None:
        """Write ``tokenizer.json`` if there is a text tower."""
        if self.encoder is None:
            return None
        content = self.subset.tokenizer_json if self.subset else tokenizer_json()
        path = folder / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        self._tokenizer = Tokenizer(content, context_length=self.context_length)
        return FileEntry.describe(path, folder)

    def spec(
        self,
        graphs: Mapping[str, Mapping[str, GraphEntry]],
        tokenizer: FileEntry | None,
        *,
        embed_dim: int,
        template_set: str,
        space: str,
    ) -> TextSpec:
        """Describe the text side for the manifest."""
        graph = graphs.get("text_encoder")
        return TextSpec(
            embed_dim=embed_dim,
            templates=self.templates,
            template_set=template_set,
            context_length=self.context_length,
            tokenizer=tokenizer,
            encoder_sha256=graph["float32"].sha256 if graph else None,
            space=space,
            words=self.subset.words if self.subset else (),
        )

    @torch.no_grad()
    def embed(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]] | None:
        """Embed class names in torch, after :meth:`write_tokenizer`.

        Args:
            names: Class names.
            templates: Prompts to use; None is all.

        Returns:
            Unit embeddings float32 [C, D] and, for the golden sample, ``token_ids`` with their
            ``prompt_embeds``; None without a text tower.
        """
        if self._tokenizer is None or self.encoder is None:
            return None
        templates = templates or self.templates
        prompts = [prompt for name in names for prompt in fill(templates, name)]
        tokens = self._tokenizer.encode(prompts)
        batches = torch.split(torch.from_numpy(tokens), _PROMPTS_PER_RUN)
        features = torch.cat([self.encoder(batch) for batch in batches])
        grouped = features.reshape(len(names), len(templates), -1)
        kept = min(len(tokens), _KEPT_PROMPTS)
        extra = {"token_ids": tokens[:kept], "prompt_embeds": features[:kept].numpy()}
        return average_templates(grouped).numpy(), extra

    def embed_golden(
        self, names: Sequence[str], embed_dim: int, templates: Sequence[str] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]]:
        """As :meth:`embed`; without a text tower random unit vectors stand for embeddings."""
        return self.embed(names, templates) or (unit_rows(len(names), embed_dim), {})


def seen_names(seen_classes: Sequence[int], class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes that a model lowers; none, with a warning, if they are not told.

    Args:
        seen_classes: Indices of the classes.
        class_names: What the indices count in.

    Raises:
        VocabularyError: There are fewer names than the indices reach.
    """
    if not seen_classes:
        return ()
    if class_names is None:
        _log.warning(
            "class_names: the model lowers the scores of %d seen classes, but they have no "
            "names; the bundle lowers none. Pass class_names to keep the calibration.",
            len(seen_classes),
        )
        return ()
    if max(seen_classes) >= len(class_names):
        raise VocabularyError(
            f"class_names: expected at least {max(seen_classes) + 1} names, because the model's "
            f"seen_classes reach {max(seen_classes)}, got {len(class_names)}. Give the whole "
            "vocabulary."
        )
    return tuple(class_names[index] for index in seen_classes)


def _choose_encoder(model: Any, choice: TextEncoderChoice) -> nn.Module | None:
    encoder: Any = model.text_encoder if choice == "auto" else choice
    if encoder is None:
        return None
    vocab_size = encoder.config.vocab_size
    if vocab_size == _CLIP_VOCAB:
        return encoder  # type: ignore[no-any-return]
    message = f"text_encoder: expected CLIP's {_CLIP_VOCAB} tokens, got {vocab_size}"
    if choice != "auto":
        raise CheckpointError(f"{message}. There is no tokenizer for another vocabulary.")
    _log.warning("%s; the bundle has no text encoder", message)
    return None
