"""The text side of a bundle: its text tower, its tokenizer, and how they embed class names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import FileEntry, GraphEntry, TextSpec
from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export.golden import unit_rows
from zsseg_rt.export.graph_files import GraphFiles, save_graphs
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.words import keep_words, tokenizer_json, written_text
from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.text.embeddings import TOKENIZERS, AnyTokenizer
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.text.vocabulary import check_templates, fill
from zsseg_rt.torch_files.shapes import divisor

_log = logging.getLogger(__name__)

CLIP_TEMPLATES = ("a photo of a {}.",)
_TEMPLATES = Path(__file__).parent / "clip_words/templates.txt"
_CLIP_VOCAB = 49408
_PROMPTS_PER_RUN = 64
_KEPT_PROMPTS = 16  # in the golden sample: enough to compare the exported graph


class TextSide:
    """Text tower, tokenizer and templates of one export."""

    def __init__(
        self,
        options: ExportOptions,
        *,
        embed_dim: int,
        templates: Sequence[str] = CLIP_TEMPLATES,
        template_set: str = "custom",
        space: str = "",
        tower: Any = None,
    ) -> None:
        self.embed_dim = embed_dim
        self.templates = check_templates(
            templates if options.templates is None else options.templates
        )
        self._set = template_set if options.template_set is None else options.template_set
        self._space = space if options.space is None else options.space
        own = options.text_encoder == "auto"
        encoder = written_text(tower if own else options.text_encoder)
        self._words: tuple[str, ...] = ()
        self._subset = None
        if encoder is not None and encoder.words:
            self._words = encoder.words
            self._subset = keep_words(encoder, encoder.words, encoder.prompt_words)
            encoder = self._subset.encoder
        else:
            encoder = _choose_encoder(encoder, own=own)
        self.encoder: WrittenText | None = encoder
        self._context_length = 77 if encoder is None else encoder.context_length
        self._tokenizer: AnyTokenizer | None = None
        self._rows: FileEntry | None = None

    def write_graph(self, folder: Path) -> GraphFiles:
        """Write the text tower if there is one, in float32 only: it runs once per phrase."""
        if self.encoder is None:
            return {}
        written, table = self.encoder.network, self.encoder.rows
        self._rows = None if table is None else _write_rows(table, folder)
        return save_graphs({"text_encoder": written}, folder, ("float32",))

    def write_tokenizer(self, folder: Path) -> FileEntry | None:
        """Write ``tokenizer.json``, or the tower's own file, if there is a text tower."""
        if self.encoder is None:
            return None
        if self.encoder.pieces is not None:
            name, data = self.encoder.pieces
            self._tokenizer = TOKENIZERS[name](data, context_length=self._context_length)
        else:
            content = self._subset.tokenizer_json if self._subset else tokenizer_json()
            name, data = "tokenizer.json", content.encode()
            self._tokenizer = Tokenizer(content, context_length=self._context_length)
        (folder / name).write_bytes(data)
        return FileEntry.describe(folder / name, folder)

    def release_tokenizer(self) -> None:
        """Let go of a tokenizer that may take more memory than a tower."""
        self._tokenizer = None

    def spec(
        self, graphs: Mapping[str, Mapping[str, GraphEntry]], tokenizer: FileEntry | None
    ) -> TextSpec:
        """Describe the text side for the manifest."""
        graph = graphs.get("text_encoder")
        return TextSpec(
            embed_dim=self.embed_dim,
            templates=self.templates,
            template_set=self._set,
            context_length=self._context_length,
            tokenizer=tokenizer,
            token_rows=self._rows,
            encoder_sha256=graph["float32"].sha256 if graph else None,
            space=self._space,
            words=self._words,
        )

    def embed(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]] | None:
        """Embed class names, after :meth:`write_tokenizer`."""
        if self._tokenizer is None:
            return None
        assert self.encoder is not None
        templates = templates or self.templates
        prompts = [prompt for name in names for prompt in fill(templates, name)]
        tokens = self._tokenizer.encode(prompts)
        parts = [
            self.encoder.embed(tokens[start : start + _PROMPTS_PER_RUN])
            for start in range(0, len(tokens), _PROMPTS_PER_RUN)
        ]
        features = np.concatenate(parts)
        embeds = _unit(_unit(features).reshape(len(names), len(templates), -1).mean(1))
        kept = tokens[:_KEPT_PROMPTS]
        extra = {"token_ids": kept, "prompt_embeds": features[:_KEPT_PROMPTS]}
        if (table := self.encoder.rows) is not None:
            extra["token_embeds"] = table[kept].astype(np.float16).astype(np.float32)
        return embeds, extra

    def embed_golden(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]]:
        """Like :meth:`embed`; without a text tower, random unit vectors replace embeddings."""
        return self.embed(names, templates) or (unit_rows(len(names), self.embed_dim), {})


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


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompts for ImageNet, which ship."""
    return tuple(_TEMPLATES.read_text(encoding="utf-8").splitlines())


def clip_text_side(
    options: ExportOptions,
    *,
    embed_dim: int,
    tower: Any,
    templates: Sequence[str] | None = None,
) -> TextSide:
    """The text side of a CLIP; without prompts of its own or given ones, CLIP's 80 for ImageNet."""
    prompts = options.templates if templates is None else templates
    return TextSide(
        options,
        embed_dim=embed_dim,
        templates=imagenet_templates() if prompts is None else prompts,
        template_set="imagenet-80" if prompts is None else "custom",
        tower=tower,
    )


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


def _choose_encoder(encoder: WrittenText | None, *, own: bool) -> WrittenText | None:
    if encoder is None or encoder.pieces is not None or encoder.vocab_size == _CLIP_VOCAB:
        return encoder
    message = f"text_encoder: expected CLIP's {_CLIP_VOCAB} tokens, got {encoder.vocab_size}"
    if not own:
        raise CheckpointError(f"{message}. There is no tokenizer for another vocabulary.")
    _log.warning("%s; the bundle has no text encoder", message)
    return None
