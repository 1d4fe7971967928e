"""Which classes training queries, and what it may know about each pixel.

Source:
    Zhou et al., "ZegCLIP", CVPR 2023: generalised zero-shot segmentation, inductive and
    transductive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, ShapeError

Protocol = Literal["inductive", "transductive", "supervised"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

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
    tells where unseen classes are, but not which of them.

    Attributes:
        query_rows: Rows of the text embeddings used as queries, int64 ``[Q]``.
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
        _check(protocol, num_classes, seen, unseen)
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
        if len(text_embeds) != self.num_classes:
            raise ShapeError(
                f"text_embeds: expected a row for each of {self.num_classes} classes, got "
                f"{len(text_embeds)}. Embed every class of the data set, seen and unseen."
            )
        return text_embeds[self.query_rows]

    def prepare(self, labels: Tensor) -> Tensor:
        """Keep the part of the annotation that training may know.

        Shapes:
            labels: Classes of the data set or ``ignore_label``, int64, any shape.

        Returns:
            Rows of the queries, ``ignore_label``, or :data:`UNSEEN`; same shape.
        """
        return self.table[labels]

    def complete(self, labels: Tensor, scores: Tensor) -> Tensor:
        """Replace :data:`UNSEEN` by pseudo labels: the unseen class with the highest score.

        Shapes:
            labels: What :meth:`prepare` returned, int64 ``[B, H, W]``.
            scores: The model's scores of the queries at the labels' resolution, float
                ``[B, Q, H, W]``; no gradient flows through them.

        Returns:
            Labels without :data:`UNSEEN`, int64 ``[B, H, W]``.
        """
        if self.protocol != "transductive":
            return labels
        best = scores.detach()[:, self.unseen_rows].argmax(dim=1)
        return torch.where(labels == UNSEEN, self.unseen_rows[best], labels)


def _check(protocol: str, num_classes: int, seen: list[int], unseen: list[int]) -> None:
    check_choice("protocol", protocol, PROTOCOLS)
    if len(set(seen)) != len(seen) or len(seen) + len(unseen) != num_classes:
        raise ArgumentError(
            f"seen: expected different class indices from 0 to {num_classes - 1}, got {seen}. "
            "Give the data set's own list."
        )
    if protocol != "supervised" and not seen:
        raise ArgumentError(
            f"seen: expected at least one class for {protocol} training, got none. "
            "Use the supervised protocol to train on every class."
        )
    if protocol == "transductive" and not unseen:
        raise ArgumentError(
            f"seen: expected fewer than all {num_classes} classes for transductive training, got "
            "all. Use the inductive or supervised protocol."
        )
