"""Train ZegCLIP and CLIP-RC, and the cosine head: CLIP tuned to compare patches with class names.

Source:
    Zhou et al., "ZegCLIP", CVPR 2023; Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot
    Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsseg_rt.common.checks import check_range
from zsseg_rt.models.dense.dense_clip import CosineHeadModel
from zsseg_rt.models.descriptor.model import DescriptorModel
from zsseg_rt.training.tasks.labelled import (
    PixelLossSettings,
    PixelLossTask,
    parameter_groups,
)
from zsseg_rt.training.tasks.losses import cross_entropy, mask_losses, recovery_loss


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


@dataclass(frozen=True, kw_only=True)
class CosineHeadSettings(PixelLossSettings):
    """Settings of CosineHeadTask, this package's; the tower's rate follows ZegCLIP's."""

    backbone_learning_rate: float = 2e-5  # 0 leaves the image tower as it is

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "backbone_learning_rate")


class CosineHeadTask(PixelLossTask):
    """The cosine head, CLIP's image tower and the logit scale are trained; no paper's recipe."""

    settings_class = CosineHeadSettings
    settings: CosineHeadSettings
    model: CosineHeadModel

    def __init__(self, model: CosineHeadModel, text_embeds: Tensor, **settings: Any) -> None:
        super().__init__(model, text_embeds, **settings)
        if self.settings.backbone_learning_rate == 0:
            model.image_encoder.requires_grad_(False)
            model.image_encoder.head.requires_grad_(True)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The cross entropy of the softmax over classes."""
        output = self.model(images, self.query_embeds)
        return {"cross_entropy": cross_entropy(*self.matched(output.mask_logits, labels))}

    def parameter_groups(self) -> list[dict[str, object]]:
        """The head, the scale without weight decay, and the image tower at its own rate."""
        encoder = self.model.image_encoder
        head = encoder.head.weight
        tower = [p for p in encoder.parameters() if p.requires_grad and p is not head]
        settings, decay = self.settings, self.settings.weight_decay
        return parameter_groups(
            ([head], settings.learning_rate, decay),
            ([self.model.log_scale], settings.learning_rate, 0.0),
            (tower, settings.backbone_learning_rate, decay),
        )
