"""CLIP's byte-pair vocabulary as a ``tokenizer.json`` for the ``tokenizers`` library."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from zsseg_rt.errors import CheckpointError
from zsseg_rt.text.tokenizer import (
    END_OF_TEXT,
    START_OF_TEXT,
    WORD_END,
    tokenizer_document,
)

_NUM_MERGES = 49152 - 256 - 2
_MERGES = Path(__file__).parent / "clip_words/merges.txt.gz"


def tokenizer_json(merges_path: Path | None = None) -> str:
    """Describe CLIP's tokenizer.

    The file's own normalizer composes accents, joins whitespace and lowers the case, for readers
    that use only the file; :class:`zsseg_rt.text.tokenizer.Tokenizer` cleans text beforehand.

    Args:
        merges_path: Merges in the layout of CLIP's ``bpe_simple_vocab_16e6.txt.gz``; None takes
            those that ship.

    Returns:
        The content of ``tokenizer.json``.

    Source:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        ICML 2021.
    """
    return _shipped() if merges_path is None else _document(merges_path)


@cache
def _shipped() -> str:
    return _document(_MERGES)


def _document(path: Path) -> str:
    merges = _read_merges(path)
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens += [START_OF_TEXT, END_OF_TEXT]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps(
        tokenizer_document(vocab, [f"{first} {second}" for first, second in merges]),
        ensure_ascii=False,
    )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: expected gzipped merges, got {exc}") from exc
    merges = [tuple(line.split()) for line in lines[1 : _NUM_MERGES + 1]]
    if len(merges) != _NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise CheckpointError(
            f"{path}: expected {_NUM_MERGES} merges of two symbols after a header line. "
            "Give CLIP's bpe_simple_vocab_16e6.txt.gz."
        )
    return [(merge[0], merge[1]) for merge in merges]


def _byte_letters() -> list[str]:
    """The letter for each byte, in vocabulary order: printable bytes first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
