"""Train CAT-Seg.

Source:
    Cho et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024,
    and its official code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.models.cat_seg.model import AggregatorLayer, CatSeg
from zsseg_rt.models.clip.towers import ResidualBlock, TextEncoder, average_templates
from zsseg_rt.text.class_names import split_synonyms
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.text.vocabulary import check_templates, fill
from zsseg_rt.training.tasks.labelled import (
    PixelLossSettings,
    PixelLossTask,
    parameter_groups,
)
from zsseg_rt.training.tasks.losses import binary_cross_entropy


@dataclass(frozen=True)
class ClassPrompts:
    """Tokens of every synonym's prompts, cut after the longest: int64 [phrases, templates, L]."""

    tokens: Tensor  # Class by class
    counts: tuple[int, ...]  # Synonyms of each class

    def of(self, classes: Sequence[int]) -> ClassPrompts:
        """Those of some classes, in their order."""
        groups = torch.split(self.tokens, list(self.counts))
        tokens = torch.cat([groups[index] for index in classes])
        return ClassPrompts(tokens, tuple(self.counts[index] for index in classes))


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


@dataclass(frozen=True, kw_only=True)
class CatSegSettings(PixelLossSettings):
    """Settings of :class:`CatSegTask`; the defaults are official."""

    weight_decay: float = 1e-4  # For every trained tensor
    backbone_learning_rate: float = 2e-6  # Peak rate of CLIP's q and v; 0 leaves CLIP as it is
    # Side of the cells whose means the attention between classes sees in training. The trained
    # model looks at every cell
    pooling: int = 2
    # The classes' tokens; without any the text tower is not tuned
    prompts: ClassPrompts | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "backbone_learning_rate")


class CatSegTask(PixelLossTask):
    """CAT-Seg with the official objective; names go through the text tower at every step."""

    settings_class = CatSegSettings
    settings: CatSegSettings
    model: CatSeg
    tokens: Tensor | None

    def __init__(self, model: CatSeg, text_embeds: Tensor, **settings: Any) -> None:
        super().__init__(model, text_embeds, **settings)
        grid = model.config.view // model.config.image_encoder.patch_size
        pooling = self.settings.pooling
        if pooling < 1 or grid % pooling:
            raise ArgumentError(
                f"pooling: expected a divisor of the grid's side {grid}, got {pooling}. Use 1 for "
                "none."
            )
        for layer in cast("Iterable[AggregatorLayer]", model.aggregator.layers):
            layer.attention.pooling = pooling
        prompts = self.settings.prompts if self.settings.backbone_learning_rate > 0 else None
        self.tunes_text = prompts is not None
        if self.settings.backbone_learning_rate == 0:
            model.image_encoder.requires_grad_(False)
        # In the last block every token attends to itself alone: nothing reads its q.
        last = cast("Sequence[ResidualBlock]", model.image_encoder.transformer.resblocks)[-1]
        last.attn.get_parameter("q_proj_weight").requires_grad_(False)
        if prompts is None:
            self.register_buffer("tokens", None, persistent=False)
            if model.text_encoder is not None:
                model.text_encoder.requires_grad_(False)
        else:
            prompts = prompts.of(self.label_protocol.query_rows.tolist())
            self.register_buffer("tokens", prompts.tokens, persistent=False)
            self._synonyms = list(prompts.counts)

    def queries(self) -> Tensor:
        """Embeddings of the classes used as queries, unit norm, float32 ``[Q, D]``."""
        tower = self.model.text_encoder
        if self.tokens is None or tower is None:
            return self.query_embeds
        phrases, templates, length = self.tokens.shape
        rows = tower.embed(self.tokens.reshape(-1, length)).float()
        rows = average_templates(rows.reshape(phrases, templates, -1))
        groups = torch.split(rows, self._synonyms)
        return F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Binary cross entropy of every pixel and class."""
        matched = self.matched(self.model(images, self.queries()).mask_logits, labels)
        return {"binary": binary_cross_entropy(*matched)}

    def parameter_groups(self) -> list[dict[str, object]]:
        """The head, and CLIP's q and v at their own rate."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        head = [p for name, p in named if "_encoder." not in name]
        clip = [p for name, p in named if "_encoder." in name]
        settings, decay = self.settings, self.settings.weight_decay
        return parameter_groups(
            (head, settings.learning_rate, decay), (clip, settings.backbone_learning_rate, decay)
        )
