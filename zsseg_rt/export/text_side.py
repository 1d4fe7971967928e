"""The text side of a bundle: its text tower, its tokenizer, and how they embed class names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import FileEntry, TextSpec
from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export.golden import random_rows
from zsseg_rt.export.graph_files import GraphFiles, save_graphs
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.words import keep_words, tokenizer_json, written_text
from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.text.embeddings import TOKENIZERS, unit_rows
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.text.vocabulary import check_templates, fill
from zsseg_rt.torch_files.shapes import divisor
from zsseg_rt.torch_files.tips_weights import TEMPLATES as TIPS_TEMPLATES

_log = logging.getLogger(__name__)

CLIP_TEMPLATES = ("a photo of a {}.",)
_TEMPLATES = Path(__file__).parent / "clip_words/templates.txt"
_CLIP_VOCAB = 49408
_FEW_TEMPLATES = 2  # in the golden sample, which needs embeddings, not the best ones
_KEPT_PROMPTS = 16  # in the golden sample: enough to compare the exported graph


class TextSide:
    """Text tower, tokenizer and templates of one export; those of CLIP unless told otherwise."""

    def __init__(
        self,
        options: ExportOptions,
        *,
        embed_dim: int,
        templates: Sequence[str] = CLIP_TEMPLATES,
        space: str = "",
        tower: Any = None,
    ) -> None:
        prompts = templates if options.templates is None else options.templates
        names = {imagenet_templates(): "imagenet-80", TIPS_TEMPLATES: "tips-9"}
        is_own = options.text_encoder == "auto"
        encoder = written_text(tower if is_own else options.text_encoder)
        self.encoder = None if encoder is None else _with_tokenizer(encoder, is_own=is_own)
        self._spec = TextSpec(
            embed_dim=embed_dim,
            templates=check_templates(prompts),
            template_set=options.template_set or names.get(tuple(prompts), "custom"),
            space=space if options.space is None else options.space,
        )

    def write_graph(self, folder: Path) -> GraphFiles:
        """Write the text tower if there is one, in float32 only: it runs once per phrase."""
        graphs = {} if self.encoder is None else {"text_encoder": self.encoder.network}
        return save_graphs(graphs, folder, ("float32",))

    def write(self, folder: Path) -> tuple[GraphFiles, TextSpec]:
        """Write the text tower and its tokenizer, if there are any, and describe the text side."""
        graphs, encoder = self.write_graph(folder), self.encoder
        if encoder is None or encoder.pieces is None:
            return graphs, self._spec
        name, content = encoder.pieces
        (folder / name).write_bytes(content)
        return graphs, replace(
            self._spec,
            context_length=encoder.context_length,
            tokenizer=FileEntry.describe(folder / name, folder),
            token_rows=None if encoder.rows is None else _write_rows(encoder.rows, folder),
            encoder_sha256=graphs["text_encoder"]["float32"].sha256,
            words=encoder.words,
        )

    def embed(
        self, names: Sequence[str], templates: Sequence[str] = ()
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]]:
        """Names by a few prompts, [C, D], and what the text tower took and gave for the first.

        Without a text tower, random unit vectors replace embeddings.
        """
        encoder, templates = self.encoder, (templates or self._spec.templates)[:_FEW_TEMPLATES]
        if encoder is None or encoder.pieces is None:
            return random_rows(len(names), self._spec.embed_dim), {}
        file, content = encoder.pieces
        tokenizer = TOKENIZERS.get(file, Tokenizer)(content, encoder.context_length)
        tokens = tokenizer.encode([text for name in names for text in fill(templates, name)])
        features = encoder.embed(tokens)
        embeds = unit_rows(unit_rows(features).reshape(len(names), len(templates), -1).mean(1))
        kept = tokens[:_KEPT_PROMPTS]
        extra = {"token_ids": kept, "prompt_embeds": features[:_KEPT_PROMPTS]}
        if (table := encoder.rows) is not None:
            extra["token_embeds"] = table[kept].astype(np.float16).astype(np.float32)
        return embeds, extra


_ROWS_AT_ONCE = 1 << 14


def _write_rows(table: Any, folder: Path) -> FileEntry:
    """Write a token table as float16, part by part."""
    path = folder / "token_rows.npy"
    with path.open("wb") as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": tuple(table.shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, table.shape[0], _ROWS_AT_ONCE):
            with np.errstate(over="ignore"):
                part = table[start : min(start + _ROWS_AT_ONCE, table.shape[0])].astype("<f2")
            if not np.isfinite(part).all():
                raise CheckpointError(
                    "token_embedding.weight: expected numbers that float16 holds, got NaN, "
                    "infinity or more than 65504. Get the weights again."
                )
            stream.write(part.tobytes())
    return FileEntry.describe(path, folder)


@cache
def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompts for ImageNet, which ship."""
    return tuple(_TEMPLATES.read_text(encoding="utf-8").splitlines())


def clip_text(tensors: Mapping[str, Any], activation: str = "quick_gelu") -> WrittenText | None:
    """The text tower of a checkpoint's arrays under CLIP's names; None of none."""
    if not tensors:
        return None
    heads = divisor("text_heads", None, tensors["positional_embedding"].shape[1])
    return WrittenText(tower=TextTower(tensors=tensors, num_heads=heads, activation=activation))


def seen_names(seen_classes: Sequence[int], class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes whose scores a model lowers; if not known, none and a warning."""
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


def _with_tokenizer(encoder: WrittenText, *, is_own: bool) -> WrittenText | None:
    """The tower with its tokenizer's file: CLIP's, its part for some words, or one of its own."""
    if encoder.words:
        subset = keep_words(encoder, encoder.words, encoder.prompt_words)
        return replace(subset.encoder, pieces=("tokenizer.json", subset.tokenizer_json))
    if encoder.pieces is not None:
        return encoder
    if encoder.vocab_size == _CLIP_VOCAB:
        return replace(encoder, pieces=("tokenizer.json", tokenizer_json()))
    message = f"text_encoder: expected CLIP's {_CLIP_VOCAB} tokens, got {encoder.vocab_size}"
    if not is_own:
        raise CheckpointError(f"{message}. There is no tokenizer for another vocabulary.")
    _log.warning("%s; the bundle has no text encoder", message)
    return None
