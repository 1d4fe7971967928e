"""Train the cosine head: CLIP fine-tuned to compare patches with class names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsseg_rt.common.checks import check_range
from zsseg_rt.models.dense.dense_clip import CosineHeadModel
from zsseg_rt.training.tasks.labelled import (
    PixelLossSettings,
    PixelLossTask,
    parameter_groups,
)
from zsseg_rt.training.tasks.losses import cross_entropy


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
