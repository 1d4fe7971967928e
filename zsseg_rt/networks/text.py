"""A text tower for an export: computed by NumPy, written as a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.tips import TipsText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.operations import Array


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """Stands where an export takes torch's text tower.

    Attributes:
        tower: Weights and sizes.
        words: What class names may be made of, for a tower that was trained on few words.
        prompt_words: Further words and punctuation that such a tower knows.
        on_mark: Hears of every block that was computed.
        pieces: A SentencePiece model, for a tower that has one instead of CLIP's tokenizer.
    """

    tower: TextTower | TipsText
    words: tuple[str, ...] = ()
    prompt_words: tuple[str, ...] = ()
    on_mark: Callable[[str], None] | None = None
    pieces: bytes | None = None

    @property
    def config(self) -> WrittenText:
        """Where its sizes are, as in torch's."""
        return self

    @property
    def context_length(self) -> int:
        """Tokens per prompt."""
        return self.tower.context_length

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return self.tower.vocab_size

    def embed(self, token_ids: Array) -> Array:
        """Embeddings float32 [T, D], not normalised, of token ids int64 [T, L]."""
        return np.asarray(self.tower.embed(Arrays(self.on_mark), token_ids))

    def network(self) -> Network:
        """The graph from ``token_ids`` to ``text_embeds``, any number of prompts."""
        graph = Graph()
        token_ids = graph.input("token_ids", ("prompts", self.context_length), "int64")
        graph.output("text_embeds", self.tower.embed(graph, token_ids))
        return graph.network()

    def with_rows(self, rows: Sequence[int]) -> WrittenText:
        """A tower that knows only these tokens, in this order."""
        key = "token_embedding.weight"
        tensors = {**self.tower.tensors, key: self.tower.tensors[key][list(rows)]}
        return replace(self, tower=replace(self.tower, tensors=tensors))
