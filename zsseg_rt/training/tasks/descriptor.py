"""Train ZegCLIP and CLIP-RC.

Source:
    Zhou et al., "ZegCLIP", CVPR 2023; Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot
    Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsseg_rt.common.checks import check_range
from zsseg_rt.models.descriptor.model import DescriptorModel
from zsseg_rt.training.tasks.labelled import (
    PixelLossSettings,
    PixelLossTask,
    parameter_groups,
)
from zsseg_rt.training.tasks.losses import mask_losses, recovery_loss


@dataclass(frozen=True, kw_only=True)
class DescriptorSettings(PixelLossSettings):
    """Settings of :class:`DescriptorTask`; the defaults are VOC's.

    Officially ``focal_weight`` is 100 (CLIP-RC on COCO-Stuff 200, fully supervised 100),
    ``dice_weight`` 1 (CLIP-RC on COCO-Stuff 3, fully supervised 1.5), and ``weight_decay`` is for
    every tensor, norms and biases too.
    """

    # Weight of CLIP-RC's two recovery losses. Officially 2; on COCO-Stuff 50; fully supervised 0
    # and 1
    recovery_weight: float = 2.0
    focal_weight: float = 100.0  # Weight of the focal loss
    dice_weight: float = 1.0  # Weight of the dice loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "focal_weight", "dice_weight", "recovery_weight")


class DescriptorTask(PixelLossTask):
    """ZegCLIP or CLIP-RC with the official objective; every trainable tensor gets a gradient."""

    settings_class = DescriptorSettings
    settings: DescriptorSettings
    model: DescriptorModel

    def __init__(self, model: DescriptorModel, text_embeds: Tensor, **settings: Any) -> None:
        super().__init__(model, text_embeds, **settings)
        model.freeze_unread()

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``focal`` and ``dice``; with a recovery decoder two more."""
        output = self.model(images, self.query_embeds)
        settings = self.settings
        focal, dice = mask_losses(*self.matched(output.mask_logits, labels))
        terms = {"focal": settings.focal_weight * focal, "dice": settings.dice_weight * dice}
        if output.recovery is not None:
            recovery, weight = output.recovery, settings.recovery_weight
            pairs = {
                "recovery_queries": (recovery.queries, recovery.query_targets),
                "recovery_patches": (recovery.patches, recovery.patch_targets),
            }
            terms |= {name: weight * recovery_loss(*pair) for name, pair in pairs.items()}
        return terms

    def parameter_groups(self) -> list[dict[str, object]]:
        """One group, as in the official code."""
        trained = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        return parameter_groups((trained, self.settings.learning_rate, self.settings.weight_decay))
