"""CLIP's byte-pair vocabulary as a ``tokenizer.json`` for the ``tokenizers`` library."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from zsseg_rt.errors import BackendUnavailableError, CheckpointError
from zsseg_rt.extras import install_command
from zsseg_rt.text.tokenizer import END_OF_TEXT, START_OF_TEXT

__all__ = ["tokenizer_json"]

_NUM_MERGES = 49152 - 256 - 2
_WORD_END = "</w>"
# One word: a marker written out, an English contraction, a run of letters, one digit, or a run of
# anything else that is not space. CLIP's pattern ignores case: U+017F folds to s there, and U+0345
# (it folds to a Greek letter) belongs to no word at all.
_WORD = (
    f"{START_OF_TEXT}|{END_OF_TEXT}|'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
    "|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+"
)


def tokenizer_json(merges_path: Path | None = None) -> str:
    """Describe CLIP's tokenizer.

    The file's own normalizer composes accents, joins whitespace and lowers the case, which serves
    readers that use it alone; :class:`zsseg_rt.text.tokenizer.Tokenizer` cleans text before.

    Args:
        merges_path: ``bpe_simple_vocab_16e6.txt.gz``; None takes the one open_clip ships.

    Returns:
        The content of ``tokenizer.json``.

    Raises:
        BackendUnavailableError: No path was given and open_clip is missing.
        CheckpointError: The file does not hold CLIP's merges.

    Source:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        ICML 2021.
    """
    merges = _read_merges(merges_path or _open_clip_merges())
    letters = _byte_letters()
    tokens = [*letters, *(letter + _WORD_END for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens += [START_OF_TEXT, END_OF_TEXT]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps(_document(vocab, merges), ensure_ascii=False)


def _open_clip_merges() -> Path:
    try:
        from open_clip.tokenizer import default_bpe
    except ImportError as exc:
        raise BackendUnavailableError(
            "merges_path: expected a file, got None while open_clip is not installed. "
            f"Run {install_command('train')}, or give "
            "the path of bpe_simple_vocab_16e6.txt.gz."
        ) from exc
    return Path(default_bpe())


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


def _document(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _WORD},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": _markers_around(vocab),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{first} {second}" for first, second in merges],
        },
    }


def _markers_around(vocab: dict[str, int]) -> dict[str, Any]:
    start = {"SpecialToken": {"id": START_OF_TEXT, "type_id": 0}}
    end = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    tokens = {
        token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
        for token in (START_OF_TEXT, END_OF_TEXT)
    }
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [
            start,
            {"Sequence": {"id": "A", "type_id": 0}},
            end,
            {"Sequence": {"id": "B", "type_id": 1}},
            end,
        ],
        "special_tokens": tokens,
    }
