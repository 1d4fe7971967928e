"""Train ZegFormer's text branch; CLIP stays as it is.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.zegformer.backbone import LearnedBatchNorm
from zsseg_rt.models.zegformer.decoder import Segments
from zsseg_rt.models.zegformer.model import IMAGE_MEAN, IMAGE_STD, ZegFormer
from zsseg_rt.training.data.batch import Batch, valid_pixels
from zsseg_rt.training.tasks.labelled import LabelledSettings, LabelledTask, check_non_negative
from zsseg_rt.training.tasks.matching import (
    SegmentWeights,
    class_masks,
    match_segments,
    segment_losses,
)
from zsseg_rt.training.tasks.task import parameter_group

_PADDING = 128  # value of a crop's padding, in 0..255, before normalisation
_NORMS = (nn.LayerNorm, nn.GroupNorm, LearnedBatchNorm, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class ZegFormerSettings(LabelledSettings):
    """Settings of :class:`ZegFormerTask`.

    Attributes:
        protocol: ``"inductive"`` or ``"supervised"``; the paper has no self-training.
        weights: Weights of the losses and the matching costs.
        learning_rate: Peak rate of everything but the backbone.
        backbone_factor: Factor of that rate for the backbone.
        weight_decay: For everything but norms and queries.
    """

    weights: SegmentWeights = field(default_factory=SegmentWeights)
    learning_rate: float = 1e-4
    backbone_factor: float = 0.1
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.protocol == "transductive":
            raise ArgumentError(
                "protocol: expected 'inductive' or 'supervised', got 'transductive'. ZegFormer "
                "gives no pixel scores to choose pseudo labels by."
            )
        check_non_negative(
            learning_rate=self.learning_rate,
            backbone_factor=self.backbone_factor,
            weight_decay=self.weight_decay,
        )


class ZegFormerTask(LabelledTask):
    """ZegFormer with the official objective; its CLIP, if it has one, is not run.

    Every decoder layer is matched and compared on its own. Pixels without a label are negatives of
    every mask. Officially the norm of all gradients is clipped to 0.01
    (:attr:`zsseg_rt.training.loop.config.OptimizerConfig.max_grad_norm`).
    """

    settings_class = ZegFormerSettings
    settings: ZegFormerSettings
    model: ZegFormer

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`TrainingTask.forward`; terms are those of :meth:`losses`."""
        images = batch.images.masked_fill(~valid_pixels(batch).unsqueeze(1), _PADDING)
        return self.losses(self.model.prepare(list(images), IMAGE_MEAN, IMAGE_STD), batch.labels)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the weighted loss terms.

        Shapes:
            images: Normalised RGB planes, float ``[B, 3, H, W]``, padded below and at the right to
                multiples of the model's divisor.
            labels: Class indices of the data set, int64 ``[B, h, w]``, ``h <= H`` and ``w <= W``.

        Returns:
            ``classification``, ``focal`` and ``dice`` of the last layer, and the same with
            ``_0``, ``_1``, ... for the others.
        """
        padding = (0, images.shape[3] - labels.shape[2], 0, images.shape[2] - labels.shape[1])
        labels = F.pad(self.label_protocol.prepare(labels), padding, value=-1)
        targets = class_masks(labels, len(self.query_embeds))
        layers = self.segments(images)
        terms: dict[str, Tensor] = {}
        for index, layer in enumerate(layers):
            matches = match_segments(layer, targets, self.settings.weights)
            made = segment_losses(
                layer, targets, matches, no_object=self.settings.weights.no_object
            )
            suffix = "" if index == len(layers) - 1 else f"_{index}"
            for name, value in made._asdict().items():
                terms[name + suffix] = getattr(self.settings.weights, name) * value
        return terms

    def segments(self, images: Tensor) -> list[Segments]:
        """What every decoder layer proposes, first to last.

        Shapes:
            images: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            Logits ``[B, Q, C + 1]`` and mask logits ``[B, Q, H / 4, W / 4]`` of each layer.
        """
        head = self.model.sem_seg_head
        maps = self.model.backbone(images)
        queries = head.predictor.decode(maps[-1])
        made = head.predictor(queries, head.pixel_decoder(maps), self.query_embeds)
        return [Segments(*layer) for layer in zip(*made, strict=True)]

    def parameter_groups(self) -> list[dict[str, object]]:
        """The backbone at its own rate; norms and queries without weight decay."""
        kept = {
            id(p)
            for module in self.model.modules()
            if isinstance(module, _NORMS)
            for p in module.parameters(recurse=False)
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                slow = name.startswith("backbone.")
                rate = self.settings.learning_rate * (
                    self.settings.backbone_factor if slow else 1.0
                )
                decay = 0.0 if id(parameter) in kept else self.settings.weight_decay
                groups.setdefault((rate, decay), []).append(parameter)
        return [
            group for key, tensors in groups.items() for group in parameter_group(tensors, *key)
        ]
