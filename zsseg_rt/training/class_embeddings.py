"""Class embeddings for training: from a bank, from CLIP weights, or from the model's text tower."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.files import read_limited, read_npy
from zsseg_rt.errors import ArgumentError, VocabularyError
from zsseg_rt.export.words import keep_words, tokenizer_json
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.clip.weights import build_text_encoder, load_clip
from zsseg_rt.text.class_names import ClassList, split_synonyms
from zsseg_rt.text.embeddings import plain
from zsseg_rt.text.name_lists import read_name_list
from zsseg_rt.text.tokenizer import Tokenizer, clean_text
from zsseg_rt.text.vocabulary import check_templates, fill
from zsseg_rt.training.config import TextConfig

_log = logging.getLogger(__name__)

_PROMPTS_PER_RUN = 64
_MOST_BANK = 1 << 30  # bytes of rows: 349,000 names of ViT-L/14


class ClassEmbeddings:
    """Embeddings of every synonym, ``phrase_embeds`` float32 [P, D], and of the classes, [C, D].

    A class has the mean over its synonyms; all rows are of unit norm.
    """

    def __init__(self, class_names: Sequence[str], phrase_embeds: Tensor) -> None:
        classes = split_synonyms(class_names)
        self.phrases = ClassList.of_groups(classes).phrases
        self.phrase_embeds = normalize(phrase_embeds.float(), dim=-1)
        groups = torch.split(self.phrase_embeds, [len(synonyms) for synonyms in classes])
        self.class_embeds = normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)


def class_embeddings(
    class_names: Sequence[str], config: TextConfig, model: nn.Module | None = None
) -> ClassEmbeddings:
    """Embed the classes of a data set as a configuration says, on the CPU."""
    if config.bank:
        return ClassEmbeddings(class_names, _from_bank(class_names, config))
    encoder: Any = getattr(model, "text_encoder", None)
    if config.clip:
        with arguments_called({"source": "text.clip", "activation": "text.clip_activation"}):
            weights = load_clip(
                config.clip,
                architecture=config.clip_architecture,
                activation=config.clip_activation or None,
            )
        encoder = build_text_encoder(weights)
    if encoder is None:
        raise ArgumentError(
            "text: expected class embeddings from somewhere, got a model without a text tower "
            "and neither text.bank nor text.clip. Set one of them."
        )
    phrases = [phrase for synonyms in split_synonyms(class_names) for phrase in synonyms]
    return ClassEmbeddings(class_names, embed_phrases(encoder, phrases, config.templates))


def region_embeddings(
    model: SegmentationModel, class_names: Sequence[str], templates: Sequence[str] = ()
) -> Tensor | None:
    """Rows as of :func:`embed_phrases` for a model's look at regions; None for other models."""
    if not model.region_templates:
        return None
    encoder: Any = model.text_encoder
    phrases = [phrase for synonyms in split_synonyms(class_names) for phrase in synonyms]
    return embed_phrases(encoder, phrases, templates or model.region_templates)


@torch.no_grad()
def embed_phrases(encoder: nn.Module, phrases: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embed phrases with a CLIP text tower, averaged over prompts, float32 ``[P, D]`` of norm 1."""
    templates = check_templates(templates)
    config: Any = encoder.config
    content, rows = tokenizer_json(), None
    if config.words:
        subset = keep_words(encoder, config.words, config.prompt_words)
        content, rows = subset.tokenizer_json, torch.tensor(subset.rows)
        _check_words(phrases, config.words)
    tokenizer = Tokenizer(content, context_length=int(config.context_length))
    prompts = [prompt for phrase in phrases for prompt in fill(templates, phrase)]
    device = next(encoder.parameters()).device
    tokens = torch.from_numpy(tokenizer.encode(prompts))
    batches = torch.split(tokens if rows is None else rows[tokens], _PROMPTS_PER_RUN)
    features = torch.cat([encoder(batch.to(device)).cpu() for batch in batches])
    return average_templates(features.reshape(len(phrases), len(templates), -1))


def _check_words(phrases: Sequence[str], words: Sequence[str]) -> None:
    """Refuse a phrase of unknown words only; warn of others that contain some."""
    for phrase in phrases:
        used = re.findall(r"\w+", clean_text(phrase))
        unknown = [word for word in used if word not in words]
        if len(unknown) == len(used):
            raise VocabularyError(
                f"class_names: expected words that the text tower learned, got {phrase!r}. It "
                f"knows: {', '.join(words)}. Train from another CLIP for other words."
            )
        if unknown:
            _log.warning("%r: the text tower never learned %s", phrase, ", ".join(unknown))


def _from_bank(class_names: Sequence[str], config: TextConfig) -> Tensor:
    """Rows of every synonym; a class that the bank knows as a whole serves for all of its own."""
    rows = _read_rows(Path(config.bank))
    names = list(class_names)
    if config.bank_names:
        listed = read_name_list(Path(config.bank_names), ArgumentError, with_ids=True)
        names = list(listed.names)
        if len(names) + len(listed.ignored) == len(rows):
            rows = torch.from_numpy(listed.pick(rows.numpy()))
    if len(names) != len(rows):
        raise VocabularyError(
            f"text.bank: expected a row for each of {len(names)} names, got {len(rows)} rows in "
            f"{config.bank}. Check text.bank_names."
        )
    by_name = {plain(name): row for name, row in zip(names, rows, strict=True)}
    phrase_rows: list[tuple[str, Tensor | None]] = []
    for name, synonyms in zip(class_names, split_synonyms(class_names), strict=True):
        whole = by_name.get(plain(name))
        phrase_rows += [(phrase, by_name.get(plain(phrase), whole)) for phrase in synonyms]
    missing = [phrase for phrase, row in phrase_rows if row is None]
    if missing:
        raise VocabularyError(
            f"text.bank: expected a row for every class, got none for {', '.join(missing[:5])}"
            f"{' and more' if len(missing) > 5 else ''} in {config.bank}. "
            "Add rows, or use text.clip."
        )
    return torch.stack([row for _, row in phrase_rows if row is not None])


def _read_rows(path: Path) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            rows: Tensor = load_file(path)["embeds"]
        else:
            content = read_limited(path, max_bytes=_MOST_BANK)
            values = read_npy(content, what=path.name, max_bytes=_MOST_BANK)
            rows = torch.from_numpy(values.astype(np.float32))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArgumentError(
            f"text.bank: expected .npy rows or .safetensors with 'embeds', got {path}: {error}. "
            "Check the file."
        ) from error
    if rows.ndim != 2 or not bool(torch.isfinite(rows).all()):
        raise VocabularyError(
            f"text.bank: expected finite rows [C, D], got shape {list(rows.shape)} in {path}. "
            "Create the file again."
        )
    return rows.float()
