"""CLIP's byte-pair tokenizer, from a bundle's ``tokenizer.json``; no torch, no open_clip."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common import schema
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import BundleError, ShapeError, VocabularyError

if TYPE_CHECKING:
    import tokenizers


_MAX_FILE_BYTES = 16 << 20


def clean_text(text: str) -> str:
    """Normalise a prompt as CLIP's training did: ftfy, HTML entities, one space, lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # else there is nothing to fix
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


class TokenRows:
    """Turns prompts into rows of token ids: of ``start``, their pieces, ``end``, then padding."""

    def __init__(
        self, context_length: int, padding: int, start: Sequence[int] = (), end: Sequence[int] = ()
    ) -> None:
        if context_length < 2:
            raise ShapeError(
                f"context_length: expected >= 2 (start and end token), got {context_length}"
            )
        self.context_length, self._padding = context_length, padding
        self._start, self._end = list(start), list(end)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token ids int64 ``[T, context_length]`` of prompts; what is longer is cut."""
        rows = np.full((len(texts), self.context_length), self._padding, np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self._start + self._ids(text)
            if not ids:
                raise VocabularyError(
                    f"class_names: expected words, got {text!r}, of which the tokenizer leaves "
                    "nothing. Write a word."
                )
            ids = ids[: self.context_length - len(self._end)] + self._end
            row[: len(ids)] = ids
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that :meth:`encode` leaves out; none where any text is spelt out."""
        return []

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError


class Tokenizer(TokenRows):
    """CLIP's: start, the words, end, zeros.

    Words that a partial tokenizer does not know are left out; see :meth:`unknown_words`.
    """

    def __init__(self, source: str | Path | bytes, context_length: int = 77) -> None:
        self._tokenizer, vocab = _load(source)
        self._first, self._last = vocab[START_OF_TEXT], vocab[END_OF_TEXT]
        self._is_partial = len(vocab) > self._last + 1
        super().__init__(context_length, 0, [self._first], [self._last])

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that :meth:`encode` leaves out, because the text encoder has none such.

        A tokenizer that leaves some out numbers symbols above its end token.
        """
        if not self._is_partial:
            return []
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(clean_text(text))
        return [word for word, _ in words if not self._ids_of_word(word)]

    def _ids_of_word(self, word: str) -> list[int]:
        ids = [token.id for token in self._tokenizer.model.tokenize(word)]
        return [] if self._is_partial and max(ids, default=0) > self._last else ids

    def _ids(self, text: str) -> list[int]:
        text = clean_text(text)
        if self._is_partial:
            words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
            return [number for word, _ in words for number in self._ids_of_word(word)]
        if START_OF_TEXT not in text and END_OF_TEXT not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        # Markers that a caller writes out are tokens of their own, but only where the word
        # pattern isolates them; the model itself would spell them letter by letter.
        markers = {START_OF_TEXT: self._first, END_OF_TEXT: self._last}
        ids: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if word in markers:
                ids.append(markers[word])
            else:
                ids.extend(token.id for token in self._tokenizer.model.tokenize(word))
        return ids


def _load(source: str | Path | bytes) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Return the tokenizer and the number of each token."""
    from tokenizers import Tokenizer as JsonTokenizer

    where = "tokenizer.json" if isinstance(source, bytes) else str(source)
    try:
        if not isinstance(source, bytes):
            source = read_limited(Path(source), max_bytes=_MAX_FILE_BYTES)
        document = read_tokenizer(source)
    except OSError as exc:
        raise BundleError(f"{where}: cannot be read: {exc}") from exc
    except ValueError as exc:
        raise BundleError(
            f"{where}: expected a CLIP tokenizer, got {exc}. Copy the bundle again."
        ) from exc
    tokenizer = JsonTokenizer.from_str(json.dumps(document, ensure_ascii=False))
    tokenizer.normalizer = None  # clean_text does more than the file's normalizer can say
    return tokenizer, document["model"]["vocab"]


START_OF_TEXT = "<start_of_text>"
END_OF_TEXT = "<end_of_text>"
WORD_END = "</w>"
# One word is a marker written out, an English contraction, a run of letters, one digit, or a run of
# anything else that is not space. CLIP's pattern ignores case: U+017F folds to s there, and U+0345
# (it folds to a Greek letter) belongs to no word at all.
_DOCUMENT = Path(__file__).with_name("clip_tokenizer.json")


def tokenizer_document(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    document: dict[str, Any] = json.loads(_DOCUMENT.read_text(encoding="utf-8"))
    document["model"] |= {"vocab": vocab, "merges": merges}
    for marker, token in document["post_processor"]["special_tokens"].items():
        token["ids"] = [vocab[marker]]
    return document


def read_tokenizer(data: bytes) -> dict[str, Any]:
    """Read a ``tokenizer.json`` and return a document of the form above."""
    document = schema.parse_json(data)
    model = document.get("model") if isinstance(document, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("no model with a vocabulary and merges")
    numbers = list(vocab.values())
    if any(type(number) is not int for number in numbers):
        raise ValueError("tokens whose numbers are not integers")
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError("tokens that are not numbered from 0 up, each number once")
    if not vocab.get(START_OF_TEXT, math.inf) < vocab.get(END_OF_TEXT, -1):
        raise ValueError(f"one without {START_OF_TEXT!r} and a later {END_OF_TEXT!r}")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocab.keys():
            raise ValueError(f"a merge that is not a pair of known tokens: {merge!r:.60}")
    ours = tokenizer_document(vocab, merges)
    if document != ours:
        keys = sorted(document.keys() | ours.keys())
        different = [key for key in keys if document.get(key) != ours.get(key)]
        raise ValueError(f"one whose {', '.join(different)} CLIP's does not have")
    return ours
