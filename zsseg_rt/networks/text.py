"""A text tower for an export: computed by NumPy, written as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zsseg_rt.networks.clip import TextTower
from zsseg_rt.networks.pooled import SiglipText
from zsseg_rt.networks.tips import TipsText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.operations import Array


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """Stands where an export takes torch's text tower."""

    tower: TextTower | TipsText | SiglipText  # Weights and sizes
    # What class names may be made of, for a tower that was trained on few words
    words: tuple[str, ...] = ()
    prompt_words: tuple[str, ...] = ()  # Further words and punctuation that such a tower knows
    # Name and content of its tokenizer's file; None of CLIP's, until a bundle is written
    pieces: tuple[str, bytes] | None = None

    @property
    def context_length(self) -> int:
        return self.tower.context_length

    @property
    def vocab_size(self) -> int:
        return self.tower.vocab_size

    def embed(self, token_ids: Array) -> Array:
        """Embeddings float32 [T, D], not normalised, of token ids int64 [T, L]."""
        if isinstance(self.tower, TextTower):  # nothing attends to what is behind the end
            token_ids = token_ids[:, : int(token_ids.argmax(1).max()) + 1]
        table = self.rows
        inputs = token_ids if table is None else table[token_ids].astype(np.float16)
        inputs = inputs if table is None else inputs.astype(np.float32)  # as the bundle stores them
        return np.asarray(self.tower.embed(Arrays(), inputs))

    @property
    def rows(self) -> Any:
        """The token table of a tower that is given rows, not numbers of rows; else None."""
        has_rows = isinstance(self.tower, SiglipText)
        return self.tower.tensors["token_embedding.weight"] if has_rows else None

    def network(self) -> Network:
        """The graph from ``token_ids`` or ``token_embeds`` to ``text_embeds``, for any prompts."""
        graph, shape = Graph(), ("prompts", self.context_length)
        if self.rows is None:
            inputs = graph.input("token_ids", shape, "int64")
        else:
            inputs = graph.input("token_embeds", (*shape, self.rows.shape[1]))
        graph.output("text_embeds", self.tower.embed(graph, inputs))
        return graph.network()

    def with_rows(self, rows: Sequence[int]) -> WrittenText:
        """A tower that knows only these tokens, in this order."""
        key = "token_embedding.weight"
        tensors = {**self.tower.tensors, key: self.tower.tensors[key][list(rows)]}
        return replace(self, tower=replace(self.tower, tensors=tensors))
