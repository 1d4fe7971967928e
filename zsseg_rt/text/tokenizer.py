"""CLIP's byte-pair tokenizer, from a bundle's ``tokenizer.json``; no torch, no open_clip."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import BundleError, ShapeError
from zsseg_rt.text.tokenizer_file import END_OF_TEXT, START_OF_TEXT, read_tokenizer

if TYPE_CHECKING:
    import tokenizers

_MAX_FILE_BYTES = 16 << 20

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TERMINAL_ESCAPE = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029\x85]")
_LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"


def clean_text(text: str) -> str:
    """Normalise a prompt as CLIP's training did: tidy Unicode and entities, one space, lower case.

    Undoes HTML entities, terminal colours, curly quotes, full-width forms, Latin ligatures and
    control characters, composes accents (NFC), joins whitespace and lowers the case as
    :meth:`str.lower` does. Text that was decoded with the wrong encoding ("schÃ¶n" for "schön") is
    *not* repaired; only there the result differs from open_clip's, which guesses the encoding.

    Example:
        >>> clean_text("  Caf\u0065\u0301 &amp;  BAR ")
        'café & bar'
    """
    tidy = "".join(_tidy_lines(text))
    unescaped = html.unescape(html.unescape(tidy))
    return " ".join(unescaped.split()).lower()


class Tokenizer:
    """Turns prompts into rows of token ids: start, the words, end, zeros.

    Words that a partial tokenizer does not know are left out; see :meth:`unknown_words`.
    """

    def __init__(self, source: str | Path, context_length: int = 77) -> None:
        if context_length < 2:
            raise ShapeError(
                f"context_length: expected >= 2 (start and end token), got {context_length}"
            )
        self.context_length = context_length
        self._where = _describe(source)
        self._tokenizer, vocab = _load(source)
        self._start, self._end = vocab[START_OF_TEXT], vocab[END_OF_TEXT]
        self._is_partial = len(vocab) > self._end + 1

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokenize prompts.

        Returns:
            int64 ``[T, context_length]``, padded with 0.
        """
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            with _without_panic(self._where):
                words = self._word_ids(clean_text(text))
            ids = [self._start, *words, self._end]
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self._end]
            row[: len(ids)] = ids
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that :meth:`encode` leaves out; only a partial tokenizer leaves any out.

        A tokenizer is partial if it numbers symbols above the end token: the text encoder has no
        embedding for those, and a word that ends up as one is unknown.
        """
        if not self._is_partial:
            return []
        with _without_panic(self._where):
            words = self._tokenizer.pre_tokenizer.pre_tokenize_str(clean_text(text))
            return [word for word, _ in words if not self._ids_of_word(word)]

    def _ids_of_word(self, word: str) -> list[int]:
        ids = [token.id for token in self._tokenizer.model.tokenize(word)]
        return [] if self._is_partial and max(ids, default=0) > self._end else ids

    def _word_ids(self, text: str) -> list[int]:
        if self._is_partial:
            words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
            return [number for word, _ in words for number in self._ids_of_word(word)]
        if START_OF_TEXT not in text and END_OF_TEXT not in text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        # Markers that a caller writes out are tokens of their own, but only where the word
        # pattern isolates them; the model itself would spell them letter by letter.
        markers = {START_OF_TEXT: self._start, END_OF_TEXT: self._end}
        ids: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if word in markers:
                ids.append(markers[word])
            else:
                ids.extend(token.id for token in self._tokenizer.model.tokenize(word))
        return ids


def _load(source: str | Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Return the tokenizer and the number of each token."""
    from tokenizers import Tokenizer as JsonTokenizer

    where, content = _describe(source), _content(source)
    try:
        document = read_tokenizer(content)
    except ValueError as exc:
        raise BundleError(
            f"{where}: expected a CLIP tokenizer, got {exc}. Copy the bundle again."
        ) from exc
    with _without_panic(where):
        tokenizer = JsonTokenizer.from_str(json.dumps(document, ensure_ascii=False))
    tokenizer.normalizer = None  # clean_text does more than the file's normalizer can say
    return tokenizer, document["model"]["vocab"]


def _content(source: str | Path) -> bytes:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source.encode(errors="surrogatepass")
    try:
        return read_limited(Path(source), max_bytes=_MAX_FILE_BYTES)
    except OSError as exc:
        raise BundleError(f"{source}: cannot be read: {exc}") from exc


@contextmanager
def _without_panic(where: str) -> Iterator[None]:
    """Turn errors of the package ``tokenizers`` into ours.

    It raises bare Exceptions and, when its native code panics, a PanicException, which derives from
    BaseException alone and cannot be imported: only its name tells it from an interrupt.
    """
    try:
        yield
    except BaseException as exc:
        if type(exc) is not Exception and type(exc).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{where}: expected a tokenizer that works, but the package tokenizers failed: {exc}. "
            "Copy the bundle again, or try another version of the package."
        ) from exc


def _describe(source: str | Path) -> str:
    is_json = isinstance(source, str) and source.lstrip().startswith("{")
    return "tokenizer.json" if is_json else str(source)


def _tidy_lines(text: str) -> list[str]:
    """Tidy line by line, each until nothing changes; a ``<`` ends the undoing of entities."""
    undo_entities, lines = True, []
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        undo_entities = undo_entities and "<" not in line
        before = None
        while line != before:
            before = line
            line = _tidy_once(_undo_entities(line) if undo_entities else line)
        lines.append(line)
    return lines


def _tidy_once(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = text.translate(_character_map())
    text = _LINE_BREAK.sub("\n", text)
    text = _SURROGATE_PAIR.sub(_join_surrogates, text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _TERMINAL_ESCAPE.sub("", text)
    return unicodedata.normalize("NFC", text.translate(_control_characters()))


def _join_surrogates(match: re.Match[str]) -> str:
    return match.group().encode("utf-16", "surrogatepass").decode("utf-16")


@lru_cache(maxsize=1)
def _character_map() -> dict[int, str]:
    """Characters that stand for plainer ones: C1 codes, ligatures, widths, curly quotes."""
    table = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in _C1_CODES}
    for ligature in _LIGATURES:
        parts = unicodedata.decomposition(ligature).split()[1:]
        table[ord(ligature)] = "".join(chr(int(part, 16)) for part in parts)
    table[0x3000] = " "
    for code in range(0xFF01, 0xFFF0):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table.update(dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"))
    table.update(dict.fromkeys(range(0x201C, 0x2020), '"'))
    return table


_C1_CODES = range(0x80, 0xA0)


@lru_cache(maxsize=1)
def _control_characters() -> dict[int, None]:
    return dict.fromkeys(
        [
            *(code for code in range(0x20) if chr(code) not in "\t\n\f\r"),
            0x7F,
            *range(0x206A, 0x2070),
            0xFEFF,
            *range(0xFFF9, 0xFFFD),
        ]
    )


def _undo_entities(text: str) -> str:
    return _ENTITY.sub(_undo_entity, text) if "&" in text else text


def _undo_entity(match: re.Match[str]) -> str:
    """Undo a known entity or number, or an entity shouted in capitals (``&EACUTE;``)."""
    entity = match.group()
    plain = html.unescape(entity)
    if entity.startswith("&#"):
        return entity if ";" in plain else plain
    if entity[1:] in _entities():
        return plain
    lower = entity.lower()
    if entity == entity.upper() and lower[1:] in _entities() and plain == entity:
        return html.unescape(lower).upper()
    return entity


@lru_cache(maxsize=1)
def _entities() -> frozenset[str]:
    import html.entities

    return frozenset(name for name in html.entities.html5 if name.endswith(";"))
