"""SentencePiece tokenizers, as TIPS has one: from a bundle's ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import BundleError, VocabularyError

_MAX_FILE_BYTES = 16 << 20
FILE = "tokenizer.model"
"""Its name in a bundle; ``tokenizer.json`` is CLIP's."""


class PieceTokenizer:
    """Turns prompts into rows of token ids: the pieces of the lower-case text, then padding.

    Padding is :attr:`vocab_size`, an id that no piece has: the model's own ids may all occur in
    texts. Needs the package sentencepiece.
    """

    def __init__(self, source: str | Path | bytes, context_length: int = 64) -> None:
        self.context_length = context_length
        self._pieces = _load(source)
        self.vocab_size = int(self._pieces.get_piece_size())

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokenize prompts.

        Returns:
            int64 ``[T, context_length]``, padded with :attr:`vocab_size`; what is longer is cut.
        """
        rows = np.full((len(texts), self.context_length), self.vocab_size, np.int64)
        for row, text in zip(rows, texts, strict=True):
            plain = text.lower().encode("utf-8", "replace").decode()
            ids = self._pieces.encode(plain, out_type=int)[: self.context_length]
            if not ids:
                raise VocabularyError(
                    f"class_names: expected text, got {text!r}, of which the tokenizer leaves "
                    "nothing. Write a word."
                )
            row[: len(ids)] = ids
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """None: any text is spelt out."""
        return []


def _load(source: str | Path | bytes) -> Any:
    with needs_extra("tips", f"for {FILE}"):
        import sentencepiece
    where = FILE if isinstance(source, bytes) else str(source)
    try:
        given = source if isinstance(source, bytes) else None
        content = given or read_limited(Path(str(source)), max_bytes=_MAX_FILE_BYTES)
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError, ValueError) as exc:
        raise BundleError(
            f"{where}: expected a SentencePiece model, got one that cannot be read "
            f"({str(exc)[:120]}). Copy the file again."
        ) from exc
