"""CLIP's text tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.models.clip.transformer import Transformer
from zsseg_rt.torch_files.clip_weights import Activation


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of a text tower; the defaults are CLIP ViT-B/16's.

    Attributes:
        vocab_size: Token ids run from 0 to ``vocab_size - 1``.
        context_length: Tokens per prompt.
        width: Token width W.
        num_layers: Residual blocks.
        num_heads: Attention heads.
        mlp_width: Hidden width of the MLPs.
        embed_dim: Width D of the joint image-text space.
        activation: ``"quick_gelu"`` for OpenAI weights, ``"gelu"`` for most others.
        words: What class names may be made of, for a tower that was trained on few words; empty:
            anything.
        prompt_words: Further words and punctuation that such a tower knows.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    embed_dim: int = 512
    activation: Activation = "quick_gelu"
    words: tuple[str, ...] = ()
    prompt_words: tuple[str, ...] = ()


class TextEncoder(nn.Module):
    """Causal transformer over token ids; the feature at the end-of-text token is projected.

    Source:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        ICML 2021.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width, config.num_layers, config.num_heads, config.mlp_width, config.activation
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed prompts.

        Shapes:
            tokens: Token ids, int64 ``[T, context_length]``, padded with 0. The end-of-text token
                must be the row's largest id, as with CLIP's tokenizer.

        Returns:
            Text embeddings, ``[T, D]``, **not** normalised.
        """
        self._check(tokens)
        return self.embed(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """:meth:`forward` for rows that may be shorter than the context.

        Tokens after the end-of-text token are never attended to, so cutting them off changes
        nothing but the time taken.

        Shapes:
            tokens: Token ids, int64 ``[T, L]``, ``L`` at most ``context_length``.

        Returns:
            Text embeddings, ``[T, D]``, **not** normalised.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        future = columns > columns.unsqueeze(1)
        mask = torch.zeros_like(future, dtype=x.dtype).masked_fill(future, float("-inf"))
        x = cast(Tensor, self.ln_final(self.transformer(x, mask=mask)))
        # A mask instead of an index: the same row, without a gather in exported graphs.
        end_of_text = (columns == tokens.argmax(dim=-1, keepdim=True)).to(x.dtype)
        return (end_of_text.unsqueeze(1) @ x).squeeze(1) @ self.text_projection

    def _check(self, tokens: Tensor) -> None:
        length = self.config.context_length
        if tokens.ndim != 2 or tokens.shape[1] != length:
            raise ShapeError(
                f"tokens: expected [T, {length}], got {list(tokens.shape)}. "
                "Tokenize with this text encoder's context length."
            )
        if tokens.is_floating_point():
            raise DTypeError(f"tokens: expected integer ids, got {tokens.dtype}. Convert to int64.")


def average_templates(text_embeds: Tensor) -> Tensor:
    """Merge the embeddings of one class under several templates: normalise, mean, normalise.

    Shapes:
        text_embeds: Embeddings, ``[..., T, D]``, T templates.

    Returns:
        One unit vector per class, ``[..., D]``.
    """
    return F.normalize(F.normalize(text_embeds, dim=-1).mean(dim=-2), dim=-1)
