"""Tasks with class labels: classes, labels, and the choice of a pixel loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError
from zsseg_rt.training.data import Batch, normalize_images


class TrainingTask(nn.Module, ABC):
    """A model and its objective; the loop knows nothing else about either.

    ``forward`` is what is wrapped for several processes, so everything with gradients happens in
    it. ``model`` is what a checkpoint stores and what evaluation and export use.
    """

    needs_labels: ClassVar[bool] = True  # whether it learns from class labels
    tunes_text: bool = False  # whether it trains the text tower: embeddings of names change

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss terms of a batch by name, scalars; their sum is minimised."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, object]]:
        """Groups for the optimizer: trainable ``params`` with ``lr`` and ``weight_decay``."""

    def left_out(self) -> Mapping[str, nn.Module]:
        """Frozen parts by name, read from files of their own, whose hashes alone are stored."""
        return {}


def parameter_groups(*groups: tuple[Sequence[Tensor], float, float]) -> list[dict[str, object]]:
    """AdamW's groups from parameters, learning rate and weight decay; empty ones are left out."""
    names = ("params", "lr", "weight_decay")
    return [dict(zip(names, group, strict=True)) for group in groups if group[0]]


Protocol = Literal["inductive", "transductive", "supervised"]

UNSEEN = -1
"""Marks a pixel of an unseen class until it gets a pseudo label."""


class LabelProtocol(nn.Module):
    """How a protocol treats classes and labels.

    ============ ==================== ========================= =============================
    protocol     queries (text rows)  labels of seen classes    labels of unseen classes
    ============ ==================== ========================= =============================
    inductive    seen, in order       row in the seen list      ``ignore_label``
    transductive all                  as they are               pseudo label of each iteration
    supervised   all                  as they are               as they are
    ============ ==================== ========================= =============================

    A pseudo label is the best of the unseen classes by the model's own scores: the annotation
    tells where unseen classes are, but not which of them. ``query_rows``, int64 [Q], are the rows
    of the text embeddings used as queries.
    """

    query_rows: Tensor
    unseen_rows: Tensor
    table: Tensor

    def __init__(
        self, protocol: Protocol, *, num_classes: int, seen: Sequence[int], ignore_label: int = 255
    ) -> None:
        super().__init__()
        seen = [int(index) for index in seen]
        unseen = sorted(set(range(num_classes)) - set(seen))
        if protocol != "supervised" and not seen:
            raise ArgumentError(
                f"seen: expected at least one class for {protocol} training, got none. "
                "Use the supervised protocol to train on every class."
            )
        if protocol == "transductive" and not unseen:
            raise ArgumentError(
                f"seen: expected fewer than all {num_classes} classes for transductive training, "
                "got all. Use the inductive or supervised protocol."
            )
        self.protocol, self.num_classes, self.ignore_label = protocol, num_classes, ignore_label
        rows = seen if protocol == "inductive" else list(range(num_classes))
        table = torch.full((max(ignore_label, num_classes) + 1,), ignore_label)
        if protocol == "inductive":
            table[seen] = torch.arange(len(seen))
        else:
            table[:num_classes] = torch.arange(num_classes)
        if protocol == "transductive":
            table[unseen] = UNSEEN
        self.register_buffer("query_rows", torch.tensor(rows), persistent=False)
        self.register_buffer("unseen_rows", torch.tensor(unseen), persistent=False)
        self.register_buffer("table", table, persistent=False)

    def select(self, text_embeds: Tensor) -> Tensor:
        """The rows of class embeddings ``[C, D]`` used as queries, ``[Q, D]``."""
        return text_embeds[self.query_rows]

    def prepare(self, labels: Tensor) -> Tensor:
        """Labels as rows of the queries, ``ignore_label`` or :data:`UNSEEN`, of any shape."""
        return self.table[labels]

    def complete(self, labels: Tensor, scores: Tensor) -> Tensor:
        """Replace :data:`UNSEEN` in prepared labels by the unseen class of the highest score.

        Labels are int64 [B, H, W], scores of the queries float [B, Q, H, W].
        """
        if self.protocol != "transductive":
            return labels
        best = scores.detach()[:, self.unseen_rows].argmax(dim=1)
        return torch.where(labels == UNSEEN, self.unseen_rows[best], labels)


@dataclass(frozen=True, kw_only=True)
class LabelledSettings:
    """Keywords of every task with class labels."""

    seen: Sequence[int]  # Indices of the seen classes
    # What training may know; see LabelProtocol
    protocol: Protocol = "inductive"
    ignore_label: int = 255  # The data set's label of unannotated pixels


class LabelledTask(TrainingTask):
    """A task that is given embeddings [C, D] of all classes, unit norm, and learns from labels."""

    settings_class: type[LabelledSettings]
    settings: LabelledSettings
    query_embeds: Tensor

    def __init__(self, model: nn.Module, text_embeds: Tensor, **settings: Any) -> None:
        super().__init__(model)
        self.settings = self.settings_class(**settings)
        self.label_protocol = LabelProtocol(
            self.settings.protocol,
            num_classes=len(text_embeds),
            seen=self.settings.seen,
            ignore_label=self.settings.ignore_label,
        )
        queries = self.label_protocol.select(text_embeds.detach())
        self.register_buffer("query_embeds", queries.float(), persistent=False)


@dataclass(frozen=True, kw_only=True)
class PixelLossSettings(LabelledSettings):
    """Keywords of every task with a loss of upsampled class logits."""

    # The loss looks at every label_stride-th row and column of the labels. Officially 1; more costs
    # less, and masks are learned on a grid that is coarser still
    label_stride: int = 1
    learning_rate: float = 2e-4  # Peak rate of everything trained except an image tower
    weight_decay: float = 0.01  # For the tensors that have weight decay

    def __post_init__(self) -> None:
        check_range(self, "weight_decay", "learning_rate")
        check_range(self, "label_stride", least=1)


class PixelLossTask(LabelledTask):
    """A task whose loss compares upsampled class logits with labels."""

    settings_class: type[PixelLossSettings] = PixelLossSettings
    settings: PixelLossSettings

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`TrainingTask.forward`; terms are those of :meth:`losses`."""
        model: Any = self.model
        images = normalize_images(batch, model.image_mean, model.image_std)
        return self.losses(images, batch.labels)

    @abstractmethod
    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted loss terms of normalised images [B, 3, H, W] and labels int64 [B, H, W]."""

    def matched(self, mask_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [B, Q, gh, gw] at the size of labels [B, H, W], and rows of queries for them.

        Where transductive training has no label, the unseen class of the highest logit is it.
        """
        step = self.settings.label_stride
        labels = labels[:, step // 2 :: step, step // 2 :: step]
        size_hw = (labels.shape[1], labels.shape[2])
        logits = F.interpolate(mask_logits.float(), size=size_hw, mode="bilinear")
        return logits, self.label_protocol.complete(self.label_protocol.prepare(labels), logits)
