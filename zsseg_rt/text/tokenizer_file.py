"""The only accepted form of ``tokenizer.json``: CLIP's byte-pair encoding, any vocabulary.

A tokenizer file may hold patterns, and a pattern may run for ever or make the package that runs it
panic. So a bundle's file is compared with the form that the exporter writes; only vocabulary and
merges may differ.
"""

from __future__ import annotations

from typing import Any

from zsseg_rt.common import schema

START_OF_TEXT = "<start_of_text>"
END_OF_TEXT = "<end_of_text>"
WORD_END = "</w>"
# One word: a marker written out, an English contraction, a run of letters, one digit, or a run of
# anything else that is not space. CLIP's pattern ignores case: U+017F folds to s there, and U+0345
# (it folds to a Greek letter) belongs to no word at all.
_WORD = (
    f"{START_OF_TEXT}|{END_OF_TEXT}|'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
    "|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Removed", "invert": True}


def tokenizer_document(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
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
                _SPLIT,
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
            "end_of_word_suffix": WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def read_tokenizer(data: bytes) -> dict[str, Any]:
    """Read a ``tokenizer.json`` and return a document of the form above."""
    document = schema.parse_json(data)
    model = document.get("model") if isinstance(document, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("no model with a vocabulary and merges")
    _check_vocabulary(vocab)
    _check_merges(merges, vocab)
    ours = tokenizer_document(vocab, merges)
    if document != ours:
        keys = sorted(document.keys() | ours.keys())
        different = [key for key in keys if document.get(key) != ours.get(key)]
        raise ValueError(f"one whose {', '.join(different)} CLIP's does not have")
    return ours


def _check_vocabulary(vocab: dict[str, Any]) -> None:
    numbers = list(vocab.values())
    if any(type(number) is not int for number in numbers):
        raise ValueError("tokens whose numbers are not integers")
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError("tokens that are not numbered from 0 up, each number once")
    for marker in (START_OF_TEXT, END_OF_TEXT):
        if marker not in vocab:
            raise ValueError(f"one without {marker!r}")
    if vocab[START_OF_TEXT] > vocab[END_OF_TEXT]:
        raise ValueError(f"one that numbers {START_OF_TEXT!r} after {END_OF_TEXT!r}")


def _check_merges(merges: list[Any], vocab: dict[str, Any]) -> None:
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocab.keys():
            raise ValueError(f"a merge that is not a pair of known tokens: {merge!r:.60}")


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
