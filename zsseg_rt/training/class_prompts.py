"""Class names as tokens, for models whose text tower is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsseg_rt.export.tokenizer_json import tokenizer_json
from zsseg_rt.models.clip.text_encoder import TextEncoder
from zsseg_rt.text.class_names import split_synonyms
from zsseg_rt.text.prompts import check_templates, fill
from zsseg_rt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ClassPrompts:
    """Tokens of every synonym's prompts, cut after the longest.

    Shapes:
        tokens: int64 ``[P, T, L]`` of P phrases under T templates.

    Attributes:
        tokens: Class by class.
        counts: Synonyms of each class.
    """

    tokens: Tensor
    counts: tuple[int, ...]

    def of(self, classes: Sequence[int]) -> ClassPrompts:
        """Those of some classes, in their order."""
        groups = torch.split(self.tokens, list(self.counts))
        chosen = torch.cat([groups[index] for index in classes])
        return ClassPrompts(chosen, tuple(self.counts[index] for index in classes))


def class_prompts(
    class_names: Sequence[str], templates: Sequence[str], tower: TextEncoder
) -> ClassPrompts:
    """Tokenize the classes of a data set; commas separate synonyms."""
    templates, groups = check_templates(templates), split_synonyms(class_names)
    tokenizer = Tokenizer(tokenizer_json(), context_length=tower.config.context_length)
    prompts = [prompt for group in groups for phrase in group for prompt in fill(templates, phrase)]
    tokens = torch.from_numpy(tokenizer.encode(prompts))
    longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the largest id
    return ClassPrompts(
        tokens[:, :longest].reshape(-1, len(templates), longest),
        tuple(len(group) for group in groups),
    )
