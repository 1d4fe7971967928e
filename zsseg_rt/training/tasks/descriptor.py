"""Train ZegCLIP and CLIP-RC.

Source:
    Zhou et al., "ZegCLIP", CVPR 2023; Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot
    Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.descriptor.clip_rc import CellOutput
from zsseg_rt.models.descriptor.model import DescriptorModel
from zsseg_rt.training.tasks.labelled import (
    PixelLossOptions,
    PixelLossTask,
    check_non_negative,
)
from zsseg_rt.training.tasks.losses import recovery_losses
from zsseg_rt.training.tasks.task import parameter_group

__all__ = ["DescriptorTask", "Trained"]

Trained = Literal["prompts", "backbone", "head"]


class DescriptorTask(PixelLossTask):
    """ZegCLIP or CLIP-RC with the official objective; the defaults are VOC's.

    The text tower is frozen and, officially, everything in the backbone but the prompts and their
    norm. Parts of ZegCLIP's last decoder layer that no loss depends on are frozen too, so that
    every trainable tensor receives a gradient.

    Args:
        model: The model to train.
        text_embeds: Embeddings of all classes of the data set, ``[C, D]``, unit norm.
        recovery_weight: Weight of CLIP-RC's two recovery losses. Officially 2; on COCO-Stuff 50;
            fully supervised 0 and 1.
        trained: ``"prompts"`` is official. ``"backbone"`` fine-tunes the whole image tower, to
            measure what prompts contribute; the model should then have none. ``"head"`` trains the
            decode head alone, as the paper's Baseline-Fix.
        **options: See :class:`zsseg_rt.training.tasks.labelled.PixelLossTask`. Officially
            ``loss="masks"`` (with ``"cross_entropy"``, to measure what that contributes, the
            model's ``score_activation`` should be ``"softmax"``), ``focal_weight`` 100 (CLIP-RC on
            COCO-Stuff 200, fully supervised 100), ``dice_weight`` 1 (CLIP-RC on COCO-Stuff 3, fully
            supervised 1.5) and ``weight_decay`` for every tensor, norms and biases too. A
            fine-tuned backbone is not official.

    Raises:
        ArgumentError: A setting is unknown or negative.
    """

    model: DescriptorModel

    def __init__(
        self,
        model: DescriptorModel,
        text_embeds: Tensor,
        *,
        recovery_weight: float = 2.0,
        trained: Trained = "prompts",
        **options: Unpack[PixelLossOptions],
    ) -> None:
        super().__init__(model, text_embeds, **options)
        if trained not in get_args(Trained):
            raise ArgumentError(
                f"trained: expected one of {', '.join(get_args(Trained))}, got {trained!r}. "
                "Check the spelling."
            )
        check_non_negative(recovery_weight=recovery_weight)
        self.recovery_weight, self.trained = recovery_weight, trained
        if trained != "prompts":
            model.backbone.requires_grad_(trained == "backbone")
        model.freeze_unread()

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the weighted loss terms; see :meth:`PixelLossTask.losses`.

        Returns:
            ``focal`` and ``dice``, or ``cross_entropy``; with a recovery decoder also
            ``recovery_queries`` and ``recovery_patches``.
        """
        output = self.model(images, self.query_embeds)
        terms = self.pixel_losses(output.mask_logits, labels)
        if isinstance(output, CellOutput) and output.recovery is not None:
            made = output.recovery
            of_queries, of_patches = recovery_losses(
                made.queries, made.query_targets, made.patches, made.patch_targets
            )
            terms["recovery_queries"] = self.recovery_weight * of_queries
            terms["recovery_patches"] = self.recovery_weight * of_patches
        return terms

    def parameter_groups(self) -> list[dict[str, object]]:
        """One group, as in the official code; a fine-tuned backbone has its own group and rate."""
        named = list(self.model.trainable_parameters())
        slow = "backbone." if self.trained == "backbone" else ()
        backbone = [tensor for name, tensor in named if name.startswith(slow)]
        others = [tensor for name, tensor in named if not name.startswith(slow)]
        return [
            *parameter_group(others, self.learning_rate, self.weight_decay),
            *parameter_group(backbone, self.backbone_learning_rate, self.weight_decay),
        ]
