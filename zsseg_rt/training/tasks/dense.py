"""Train the dense baseline: CLIP fine-tuned to compare patches with class names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zsseg_rt.models.dense_baseline import DenseBaseline
from zsseg_rt.training.protocols import Protocol
from zsseg_rt.training.task import Batch, normalize_images
from zsseg_rt.training.tasks.labelled import PixelLoss, PixelLossTask, check_non_negative

__all__ = ["DenseTask"]


class DenseTask(PixelLossTask):
    """The baseline of ZegCLIP's comparison: image tower, head and logit scale are trained.

    The paper states neither rates nor losses of its baseline: these defaults are this package's,
    the rate of the tower being the one that ZegCLIP's configuration has before its multipliers.

    Args:
        model: The model to train.
        text_embeds: Embeddings of all classes of the data set, ``[C, D]``, unit norm.
        seen: Indices of the seen classes.
        protocol: What training may know; see :class:`zsseg_rt.training.protocols.LabelProtocol`.
        ignore_label: The data set's label of unannotated pixels. They do not count, except for
            ``loss="masks"``, where they are negatives of every class.
        loss: ``"cross_entropy"``, or ``"masks"`` for ZegCLIP's focal and dice loss; the model's
            ``score_activation`` should then be ``"sigmoid"``.
        focal_weight: Of ``loss="masks"``.
        dice_weight: Of ``loss="masks"``.
        label_stride: See :class:`zsseg_rt.training.tasks.labelled.PixelLossTask`.
        train_backbone: Whether the image tower is trained; without, only head and scale are.
        learning_rate: Peak rate of the head and the scale.
        backbone_learning_rate: Peak rate of the image tower.
        weight_decay: For every tensor but the scale.

    Raises:
        ArgumentError: A setting is unknown or negative.
    """

    model: DenseBaseline

    def __init__(
        self,
        model: DenseBaseline,
        text_embeds: Tensor,
        *,
        seen: Sequence[int],
        protocol: Protocol = "inductive",
        ignore_label: int = 255,
        loss: PixelLoss = "cross_entropy",
        focal_weight: float = 100.0,
        dice_weight: float = 1.0,
        label_stride: int = 1,
        train_backbone: bool = True,
        learning_rate: float = 2e-4,
        backbone_learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            model,
            text_embeds,
            seen=seen,
            protocol=protocol,
            ignore_label=ignore_label,
            loss=loss,
            focal_weight=focal_weight,
            dice_weight=dice_weight,
            label_stride=label_stride,
        )
        check_non_negative(
            learning_rate=learning_rate,
            backbone_learning_rate=backbone_learning_rate,
            weight_decay=weight_decay,
        )
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.backbone_learning_rate = backbone_learning_rate
        model.image_encoder.requires_grad_(train_backbone)
        model.image_encoder.head.requires_grad_(True)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`TrainingTask.forward`; terms are those of :meth:`losses`."""
        images = normalize_images(batch, self.model.image_mean, self.model.image_std)
        return self.losses(images, batch.labels)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the weighted loss terms; see :meth:`PixelLossTask.losses`.

        Returns:
            ``cross_entropy``, or ``focal`` and ``dice``.
        """
        output = self.model(images, self.query_embeds)
        return self.pixel_losses(output.mask_logits, labels)

    def parameter_groups(self) -> list[dict[str, object]]:
        """The head, the scale without weight decay, and the image tower at its own rate."""
        head = self.model.image_encoder.head.weight
        tower = [
            p for p in self.model.image_encoder.parameters() if p.requires_grad and p is not head
        ]
        groups = [
            ([head], self.learning_rate, self.weight_decay),
            ([self.model.log_scale], self.learning_rate, 0.0),
            (tower, self.backbone_learning_rate, self.weight_decay),
        ]
        return [
            {"params": tensors, "lr": rate, "weight_decay": decay}
            for tensors, rate, decay in groups
            if tensors
        ]
