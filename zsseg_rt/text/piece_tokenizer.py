"""Tokenizers of pieces beside CLIP's: of TIPS, by SentencePiece, and of SigLIP 2, Gemma's."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import BundleError
from zsseg_rt.text.tokenizer import TokenRows, clean_text

# Names in a bundle; tokenizer.json is CLIP's. Gemma's has pieces and merges alone: a tokenizer.json
# may hold patterns.
PIECES_FILE, GEMMA_FILE = "tokenizer.model", "gemma.json"
_MAX_FILE_BYTES = 64 << 20
_UNKNOWN = "<unk>"
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class PieceTokenizer(TokenRows):
    """TIPS's: the pieces of the lower-case text, padded with an id that no piece has."""

    def __init__(self, source: str | Path | bytes, context_length: int = 64) -> None:
        with needs_extra("tips", f"for {PIECES_FILE}"):
            import sentencepiece

        def read(content: bytes) -> Any:
            return sentencepiece.SentencePieceProcessor(model_proto=content)

        self._pieces = _read(source, PIECES_FILE, read, "a SentencePiece model")
        self.vocab_size = int(self._pieces.get_piece_size())
        super().__init__(context_length, self.vocab_size)

    def _ids(self, text: str) -> list[int]:
        return list(self._pieces.encode(_valid(text).lower(), out_type=int))


class GemmaTokenizer(TokenRows):
    """SigLIP 2's: byte pairs of plain text, the end token 1, zeros."""

    def __init__(self, source: str | Path | bytes, context_length: int = 64) -> None:
        from tokenizers import models

        def read(content: bytes) -> Any:
            pieces, merges = _checked(json.loads(content))
            self.vocab_size = len(pieces)
            return models.BPE(pieces, merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)

        self._model = _read(source, GEMMA_FILE, read, "pieces and merges of Gemma's tokenizer")
        super().__init__(context_length, 0, end=[1])

    def _ids(self, text: str) -> list[int]:
        plain = canonical_text(_valid(text)).replace(" ", "\u2581")
        return [token.id for token in self._model.tokenize(plain)] if plain else []


def _valid(text: str) -> str:
    """The text without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _read(
    source: str | Path | bytes, file: str, read: Callable[[bytes], Any], expected: str
) -> Any:
    where, content = (file, source) if isinstance(source, bytes) else (str(source), b"")
    try:
        return read(content or read_limited(Path(where), max_bytes=_MAX_FILE_BYTES))
    except (OSError, RuntimeError, ValueError) as exc:
        raise BundleError(
            f"{where}: expected {expected}, got one that cannot be read "
            f"({str(exc)[:120]}). Copy the file again."
        ) from exc


def canonical_text(text: str) -> str:
    """Clean a prompt as SigLIP's evaluation does: lower case, no punctuation, single spaces."""
    return " ".join(clean_text(text).translate(_NO_PUNCTUATION).split())


def gemma_json(model: Mapping[str, Any]) -> bytes:
    """The content of ``gemma.json`` for the model of a ``tokenizer.json``."""
    vocab, merges = model["vocab"], model["merges"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("pieces that are not numbered from 0 up")
    raw = {
        "pieces": pieces,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()


def _checked(raw: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(key), list) and {str} >= set(map(type, raw[key]))
        for key in ("pieces", "merges")
    ):
        raise ValueError("no lists of pieces and merges")
    pieces = raw["pieces"]
    vocab = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(vocab) != len(pieces) or _UNKNOWN not in vocab:
        raise ValueError(f"a piece twice, or no {_UNKNOWN}")
    pairs = []
    for merge in raw["merges"]:
        first, _, second = merge.partition(" ")
        one, other = vocab.get(first), vocab.get(second)
        if one is None or other is None or first + second not in vocab:
            raise ValueError(f"a merge that is no pair of pieces: {merge!r:.60}")
        pairs.append((pieces[one], pieces[other]))  # no text twice: there are many
    return vocab, pairs
