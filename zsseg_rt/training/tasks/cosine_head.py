"""Train the cosine head: CLIP fine-tuned to compare patches with class names."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from zsseg_rt.models.dense.cosine_head import CosineHeadModel
from zsseg_rt.training.tasks.labelled import PixelLossOptions, PixelLossTask
from zsseg_rt.training.tasks.task import parameter_group

__all__ = ["CosineHeadTask"]


class CosineHeadTask(PixelLossTask):
    """The cosine head, CLIP's image tower and the logit scale are trained; no paper's recipe.

    The defaults are this package's, with the tower's rate taken from ZegCLIP's configuration,
    before its multipliers.

    Args:
        model: The model to train.
        text_embeds: Embeddings of all classes of the data set, ``[C, D]``, unit norm.
        train_backbone: Whether the image tower is trained; if not, only head and scale are.
        **options: See :class:`zsseg_rt.training.tasks.labelled.PixelLossTask`, but ``loss`` is
            ``"cross_entropy"`` unless given (with ``"masks"``, ZegCLIP's focal and dice loss, the
            model's ``score_activation`` should be ``"sigmoid"``) and ``backbone_learning_rate``
            2e-5. The scale has no weight decay.

    Raises:
        ArgumentError: A setting is unknown or negative.
    """

    model: CosineHeadModel

    def __init__(
        self,
        model: CosineHeadModel,
        text_embeds: Tensor,
        *,
        train_backbone: bool = True,
        **options: Unpack[PixelLossOptions],
    ) -> None:
        options.setdefault("loss", "cross_entropy")
        options.setdefault("backbone_learning_rate", 2e-5)
        super().__init__(model, text_embeds, **options)
        model.image_encoder.requires_grad_(train_backbone)
        model.image_encoder.head.requires_grad_(True)

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
        return [
            *parameter_group([head], self.learning_rate, self.weight_decay),
            *parameter_group([self.model.log_scale], self.learning_rate, 0.0),
            *parameter_group(tower, self.backbone_learning_rate, self.weight_decay),
        ]
