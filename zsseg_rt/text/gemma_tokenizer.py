"""Gemma's tokenizer as SigLIP 2 uses it: byte pairs of plain text, from a bundle's ``gemma.json``.

A ``tokenizer.json`` may hold patterns; a bundle's file holds pieces and merges alone.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.text.tokenizer import clean_text

FILE = "gemma.json"
"""Its name in a bundle."""
_MAX_FILE_BYTES = 64 << 20
_END = 1
_UNKNOWN = "<unk>"
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def canonical_text(text: str) -> str:
    """Clean a prompt as SigLIP's evaluation does: lower case, no ASCII punctuation, single spaces.

    Example:
        >>> canonical_text("A photo of a  traffic-light.")
        'a photo of a trafficlight'
    """
    return " ".join(clean_text(text).translate(_NO_PUNCTUATION).split())


class GemmaTokenizer:
    """Turns prompts into rows of token ids: the pieces, the end token 1, zeros."""

    def __init__(self, source: str | Path | bytes, context_length: int = 64) -> None:
        from tokenizers import models

        self.context_length = context_length
        where = FILE if isinstance(source, bytes) else str(source)
        try:
            given = source if isinstance(source, bytes) else None
            content = given or read_limited(Path(str(source)), max_bytes=_MAX_FILE_BYTES)
            pieces, merges = _checked(json.loads(content))
            self._model: Any = models.BPE(
                pieces, merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True
            )
        except (OSError, ValueError, RecursionError) as exc:
            raise BundleError(
                f"{where}: expected pieces and merges of Gemma's tokenizer, got {str(exc)[:120]}. "
                "Copy the bundle again."
            ) from exc
        self.vocab_size = len(pieces)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokenize prompts.

        Returns:
            int64 ``[T, context_length]``; what is longer is cut and still ends in the end token.
        """
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            plain = canonical_text(text).encode("utf-8", "replace").decode()
            if not plain:
                raise VocabularyError(
                    f"class_names: expected words, got {text!r}, of which SigLIP reads nothing: it "
                    "leaves punctuation out. Write a word."
                )
            tokens = self._model.tokenize(plain.replace(" ", "\u2581"))
            ids = [*(token.id for token in tokens[: self.context_length - 1]), _END]
            row[: len(ids)] = ids
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """None: any text is spelt out."""
        return []


def gemma_json(vocab: dict[str, int], merges: Sequence[str | Sequence[str]]) -> bytes:
    """The content of ``gemma.json`` for the model of a ``tokenizer.json``."""
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("pieces that are not numbered from 0 up")
    raw = {
        "pieces": pieces,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()


def _checked(raw: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    pieces, merges = raw.get("pieces"), raw.get("merges")
    if not isinstance(pieces, list) or not isinstance(merges, list):
        raise ValueError("no lists of pieces and merges")
    if not {str} >= set(map(type, pieces)) | set(map(type, merges)):
        raise ValueError("pieces or merges that are no texts")
    vocab = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(vocab) != len(pieces) or _UNKNOWN not in vocab:
        raise ValueError(f"a piece twice, or no {_UNKNOWN}")
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        one, other = vocab.get(first), vocab.get(second)
        if one is None or other is None or first + second not in vocab:
            raise ValueError(f"a merge that is no pair of pieces: {merge!r:.60}")
        pairs.append((pieces[one], pieces[other]))  # no text twice: there are many
    return vocab, pairs
