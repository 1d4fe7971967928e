"""CLIP's vocabulary as ``tokenizer.json``, and text towers that know some words only.

Such a tower's table keeps the rows of these words, whose tokens are numbered anew. A symbol that
merging passes through, but that no word ends up with, gets a number above the end token's, and
:class:`zsseg_rt.text.tokenizer.Tokenizer` leaves out words that still contain one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export.graph_files import weights_of
from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.text.tokenizer import (
    END_OF_TEXT,
    START_OF_TEXT,
    WORD_END,
    tokenizer_document,
)

_NUM_MERGES = 49152 - 256 - 2
_MERGES = Path(__file__).parent / "clip_words/merges.txt.gz"


@cache
def tokenizer_json() -> bytes:
    """CLIP's tokenizer, whose own normalizer serves readers that use only the file."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : _NUM_MERGES + 1]
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [START_OF_TEXT, END_OF_TEXT]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps(tokenizer_document(vocab, merges), ensure_ascii=False).encode()


def _byte_letters() -> list[str]:
    """The letter for each byte, in vocabulary order: printable bytes first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


# --- some words only ---


class WordSubset(NamedTuple):
    """A text tower with the tokens of some words only."""

    encoder: WrittenText
    tokenizer_json: bytes  # The tokenizer that goes with it
    rows: tuple[int, ...]  # The whole tower's token for each of this one's


def keep_words(encoder: Any, words: Sequence[str], other_words: Sequence[str] = ()) -> WordSubset:
    """Cut a text tower, torch's or a written one, down to some words."""
    if not words:
        raise VocabularyError("words: expected at least one, got none. Name what training saw.")
    tower = written_text(encoder)
    full = json.loads(tokenizer_json())
    vocab: dict[str, int] = full["model"]["vocab"]
    if tower is None or tower.vocab_size != len(vocab):
        raise CheckpointError(
            f"encoder: expected CLIP's {len(vocab)} tokens, got {tower and tower.vocab_size}. "
            "Only a tower with CLIP's own tokenizer can be cut down."
        )
    ranks = {tuple(merge.split()): rank for rank, merge in enumerate(full["model"]["merges"])}
    tokens, merges, symbols = _merged([*words, *other_words], ranks)
    numbering = _number(vocab, tokens, symbols)
    rows = [vocab[token] for token in numbering][: numbering[END_OF_TEXT] + 1]
    full["model"]["vocab"] = numbering
    full["model"]["merges"] = [" ".join(pair) for pair in sorted(merges, key=ranks.__getitem__)]
    for token, entry in full["post_processor"]["special_tokens"].items():
        entry["ids"] = [numbering[token]]
    content = json.dumps(full, ensure_ascii=False).encode()
    return WordSubset(tower.with_rows(rows), content, tuple(rows))


def written_text(tower: Any) -> WrittenText | None:
    """A text tower as exports take it: torch's becomes arrays, which share its memory."""
    if tower is None or isinstance(tower, WrittenText):
        return tower
    config = tower.config
    arrays = TextTower(
        tensors=weights_of(tower), num_heads=config.num_heads, activation=config.activation
    )
    return WrittenText(tower=arrays, words=config.words, prompt_words=config.prompt_words)


def _merged(
    words: Sequence[str], ranks: Mapping[tuple[str, ...], int]
) -> tuple[set[str], set[tuple[str, ...]], set[str]]:
    """The tokens of words by byte-pair merging, its merges, and all symbols on the way."""
    tokens, merges, symbols = set[str](), set[tuple[str, ...]](), set[str]()
    for word in words:
        if not word.isascii() or word != word.lower() or not (word.isalpha() or len(word) == 1):
            raise VocabularyError(
                f"words: expected single lower-case words of ASCII letters, got {word!r}. "
                "Split names into their words."
            )
        parts = [*word[:-1], word[-1] + WORD_END]
        symbols.update(parts)
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            pair = min(pairs, key=ranks.__getitem__)
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
            merges.add(pair)
            symbols.update(parts)
        tokens.update(parts)
    return tokens, merges, symbols


def _number(vocab: Mapping[str, int], tokens: set[str], symbols: set[str]) -> dict[str, int]:
    """New numbers: the padding's token, known tokens in CLIP's order, markers, then the rest."""
    padding = next(token for token, number in vocab.items() if number == 0)
    known = sorted(tokens - {padding}, key=vocab.__getitem__)
    letters = {token for token, number in vocab.items() if number < 512}  # merging starts from them
    rest = sorted(letters | symbols, key=vocab.__getitem__)
    order = dict.fromkeys([padding, *known, START_OF_TEXT, END_OF_TEXT, *rest])
    return {token: number for number, token in enumerate(order)}
