"""What all tasks with class labels share: classes, labels, and the choice of a pixel loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.training.data.batch import Batch, normalize_images
from zsseg_rt.training.tasks.losses import (
    Unannotated,
    binary_cross_entropy,
    cross_entropy,
    mask_losses,
)
from zsseg_rt.training.tasks.protocols import LabelProtocol, Protocol
from zsseg_rt.training.tasks.task import TrainingTask

PixelLoss = Literal["masks", "cross_entropy", "binary"]


def check_non_negative(**settings: float) -> None:
    """Refuse settings that are negative or not finite."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= 0):
            raise ArgumentError(
                f"{name}: expected a number of at least 0, got {value}. Use 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class LabelledSettings:
    """What every task with class labels is given by keyword.

    Attributes:
        seen: Indices of the seen classes.
        protocol: What training may know; see
            :class:`zsseg_rt.training.tasks.protocols.LabelProtocol`.
        ignore_label: The data set's label of unannotated pixels.
    """

    seen: Sequence[int]
    protocol: Protocol = "inductive"
    ignore_label: int = 255


class LabelledTask(TrainingTask):
    """A task that is given class embeddings and learns from class labels.

    Shapes:
        text_embeds: Embeddings of all classes of the data set, ``[C, D]``, unit norm.

    Attributes:
        query_embeds: Embeddings of the classes used as queries, float32 ``[Q, D]``.
    """

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
    """What every task with a loss of upsampled class logits is given by keyword.

    Attributes:
        ignore_label: The data set's label of unannotated pixels. They are negatives of every class
            for ``loss="masks"`` unless ``unannotated`` says otherwise, and do not count for
            ``"cross_entropy"``.
        loss: ``"masks"`` is focal and dice loss of one mask per class, ``"cross_entropy"`` a
            softmax over classes, ``"binary"`` a sigmoid of each.
        unannotated: What pixels without a label to learn are for ``loss="masks"`` and
            ``"binary"``: ``"negative"``, of every class, is official; ``"ignore"`` leaves them
            out. Inductive training gives pixels of unseen classes no label, so they are left out
            too.
        focal_weight: Weight of the focal loss.
        dice_weight: Weight of the dice loss.
        label_stride: The loss looks at every ``label_stride``-th row and column of the labels.
            Officially 1; more costs less, and masks are learned on a grid that is coarser still.
        learning_rate: Peak rate of everything trained except a fine-tuned image tower.
        backbone_learning_rate: Peak rate of a fine-tuned image tower.
        weight_decay: For the tensors that have weight decay.
    """

    loss: PixelLoss = "masks"
    unannotated: Unannotated = "negative"
    focal_weight: float = 100.0
    dice_weight: float = 1.0
    label_stride: int = 1
    learning_rate: float = 2e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, get_args(PixelLoss))
        check_choice("unannotated", self.unannotated, get_args(Unannotated))
        check_non_negative(
            focal_weight=self.focal_weight,
            dice_weight=self.dice_weight,
            learning_rate=self.learning_rate,
            backbone_learning_rate=self.backbone_learning_rate,
            weight_decay=self.weight_decay,
        )
        if self.label_stride < 1:
            raise ArgumentError(
                f"label_stride: expected at least 1, got {self.label_stride}. Use 1 or more."
            )


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
        """Compute the weighted loss terms.

        Shapes:
            images: Normalised RGB planes, float ``[B, 3, H, W]``.
            labels: Class indices of the data set, int64 ``[B, H, W]``.

        Returns:
            Scalars by name.
        """

    def pixel_losses(self, mask_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compare mask logits with labels, after upsampling and pseudo labelling.

        Shapes:
            mask_logits: Logits of the queries at the grid's resolution, ``[B, Q, gh, gw]``.
            labels: Class indices of the data set, int64 ``[B, H, W]``.

        Returns:
            The weighted loss terms.
        """
        step = self.settings.label_stride
        labels = labels[:, step // 2 :: step, step // 2 :: step]
        logits = upsample(mask_logits, labels)
        labels = self.label_protocol.prepare(labels)
        if self.label_protocol.protocol == "transductive":
            labels = self.label_protocol.complete(labels, self._scores(logits))
        if self.settings.loss == "cross_entropy":
            return {"cross_entropy": cross_entropy(logits, labels)}
        unannotated = self.settings.unannotated
        if self.settings.loss == "binary":
            return {"binary": binary_cross_entropy(logits, labels, unannotated=unannotated)}
        focal, dice = mask_losses(logits, labels, unannotated=unannotated)
        return {
            "focal": self.settings.focal_weight * focal,
            "dice": self.settings.dice_weight * dice,
        }

    def _scores(self, logits: Tensor) -> Tensor:
        """Scores that choose pseudo labels; logits order classes as their softmax does."""
        return (
            logits.detach() if self.settings.loss == "cross_entropy" else logits.detach().sigmoid()
        )


def upsample(mask_logits: Tensor, labels: Tensor) -> Tensor:
    """Bring ``[B, Q, gh, gw]`` to the resolution of labels ``[B, H, W]``, bilinear, float32."""
    size_hw = (labels.shape[1], labels.shape[2])
    return F.interpolate(mask_logits.float(), size=size_hw, mode="bilinear", align_corners=False)
