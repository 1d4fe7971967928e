"""Train ZegFormer's text branch; CLIP stays as it is.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.zegformer.decoder import BatchNorm, Segments
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD
from zsseg_rt.training.data import Batch, valid_pixels
from zsseg_rt.training.tasks.labelled import (
    LabelledSettings,
    LabelledTask,
    parameter_groups,
)
from zsseg_rt.training.tasks.losses import negative_focal, positive_focal, process_mean

_PADDING = 128  # value of a crop's padding, in 0..255, before normalisation
_NORMS = (nn.LayerNorm, nn.GroupNorm, BatchNorm, nn.Embedding)


class ClassMasks(NamedTuple):
    """The classes of one image, int64 ``[G]`` ascending, and a mask of each, bool ``[G, H, W]``."""

    classes: Tensor
    masks: Tensor


class Match(NamedTuple):
    """Pairs of one image: indices of segments, ascending, and of class masks, both int64."""

    segments: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class SegmentWeights:
    """Weights of the three losses and of the matching costs; the defaults are official."""

    classification: float = 1.0  # Weight of the classification
    focal: float = 20.0  # Weight of the masks' focal loss
    dice: float = 1.0  # Weight of the masks' dice loss
    no_object: float = 0.1  # Weight of a segment without a class in the classification


def class_masks(labels: Tensor, num_classes: int) -> list[ClassMasks]:
    """One binary mask for each class present in each image, of labels int64 ``[B, H, W]``.

    A pixel outside ``[0, num_classes)`` belongs to no mask, so it is a negative of every mask.
    """
    targets = []
    for image in labels:
        classes = image.unique()
        classes = classes[(classes >= 0) & (classes < num_classes)]
        targets.append(ClassMasks(classes, image == classes.view(-1, 1, 1)))
    return targets


@torch.no_grad()
def match_segments(
    segments: Segments, targets: Sequence[ClassMasks], weights: SegmentWeights
) -> list[Match]:
    """Match each image's class masks with the segments that cost least in total.

    A pair's cost is the weighted sum of minus the class's probability, the focal loss and the dice
    loss of the mask, at the resolution of the segments; targets are resized by nearest neighbour.
    """
    matches = []
    for logits, masks, target in zip(*segments, targets, strict=True):
        probability = logits.float().softmax(dim=-1)[:, target.classes]
        size_hw = (masks.shape[1], masks.shape[2])
        wanted = F.interpolate(target.masks.unsqueeze(1).float(), size=size_hw, mode="nearest")
        z, y = masks.float().flatten(1), wanted.flatten(1)
        s = z.sigmoid()
        focal = (positive_focal(z) @ y.T + negative_focal(z) @ (1 - y).T) / z.shape[1]
        dice = 1 - (2 * s @ y.T + 1) / (s.sum(dim=1, keepdim=True) + y.sum(dim=1) + 1)
        cost = weights.focal * focal - weights.classification * probability + weights.dice * dice
        # A model that has diverged must yield non-finite losses, not an error here.
        pairs = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
        matches.append(Match(*(torch.from_numpy(rows).to(masks.device) for rows in pairs)))
    return matches


def segment_losses(
    segments: Segments, targets: Sequence[ClassMasks], matches: Sequence[Match], *, no_object: float
) -> dict[str, Tensor]:
    """The losses of one decoder layer, which compare matched segments with their class masks.

    Unmatched segments should be "no object". Mask logits are upsampled to the targets' resolution
    (bilinear). Both mask losses are sums over pairs divided by the number of class masks in the
    batch, averaged over processes and at least 1.
    """
    logits = segments.logits.float()
    nothing = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:2], nothing, device=logits.device)
    for row, target, match in zip(classes, targets, matches, strict=True):
        row[match.segments] = target.classes[match.targets]
    weight = logits.new_ones(nothing + 1)
    weight[nothing] = no_object
    num_masks = process_mean(logits.new_tensor(sum(len(t.classes) for t in targets)))
    focal, dice = _pair_losses(segments.masks, targets, matches)
    return {
        "classification": F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight),
        "focal": focal / num_masks.clamp(min=1),
        "dice": dice / num_masks.clamp(min=1),
    }


def _pair_losses(
    mask_logits: Tensor, targets: Sequence[ClassMasks], matches: Sequence[Match]
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss summed over the pairs of all images."""
    masks = torch.cat([m[match.segments] for m, match in zip(mask_logits, matches, strict=True)])
    wanted = torch.cat([t.masks[match.targets] for t, match in zip(targets, matches, strict=True)])
    if not len(masks):
        return mask_logits.sum() * 0.0, mask_logits.sum() * 0.0
    size_hw = (wanted.shape[1], wanted.shape[2])
    resized = F.interpolate(masks.float().unsqueeze(1), size=size_hw, mode="bilinear")
    z, y = resized.flatten(1), wanted.flatten(1)
    s = z.sigmoid()
    focal = torch.where(y, positive_focal(z), negative_focal(z)).mean(dim=1).sum()
    dice = 1 - (2 * (s * y).sum(dim=1) + 1) / (s.sum(dim=1) + y.sum(dim=1) + 1)
    return focal, dice.sum()


@dataclass(frozen=True, kw_only=True)
class ZegFormerSettings(LabelledSettings):
    """Settings of ZegFormerTask; the paper has no self-training."""

    # Weights of the losses and the matching costs
    weights: SegmentWeights = field(default_factory=SegmentWeights)
    learning_rate: float = 1e-4  # Peak rate of everything but the backbone
    backbone_factor: float = 0.1  # Factor of that rate for the backbone
    weight_decay: float = 1e-4  # For everything but norms and queries

    def __post_init__(self) -> None:
        if self.protocol == "transductive":
            raise ArgumentError(
                "protocol: expected 'inductive' or 'supervised', got 'transductive'. ZegFormer "
                "gives no pixel scores to choose pseudo labels by."
            )
        check_range(self, "learning_rate", "backbone_factor", "weight_decay")


class ZegFormerTask(LabelledTask):
    """ZegFormer with the official objective; its CLIP, if it has one, is not run.

    Every decoder layer is matched and compared on its own. Pixels without a label are negatives of
    every mask. Officially the norm of all gradients is clipped to 0.01.
    """

    settings_class = ZegFormerSettings
    settings: ZegFormerSettings
    model: ZegFormer

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`TrainingTask.forward`; terms are those of :meth:`losses`."""
        images = batch.images.masked_fill(~valid_pixels(batch).unsqueeze(1), _PADDING)
        return self.losses(self.model.prepare(list(images), IMAGE_MEAN, IMAGE_STD), batch.labels)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted loss terms of each decoder layer.

        Images are normalised float [B, 3, H, W], padded below and at the right to multiples of the
        model's divisor; labels int64 [B, h, w] of the data set, not padded.
        """
        padding = (0, images.shape[3] - labels.shape[2], 0, images.shape[2] - labels.shape[1])
        labels = F.pad(self.label_protocol.prepare(labels), padding, value=-1)
        targets = class_masks(labels, len(self.query_embeds))
        layers, weights = self.segments(images), self.settings.weights
        terms: dict[str, Tensor] = {}
        for index, layer in enumerate(layers):
            matches = match_segments(layer, targets, weights)
            losses = segment_losses(layer, targets, matches, no_object=weights.no_object)
            suffix = "" if index == len(layers) - 1 else f"_{index}"
            for name, value in losses.items():
                terms[name + suffix] = getattr(weights, name) * value
        return terms

    def segments(self, images: Tensor) -> list[Segments]:
        """Logits ``[B, Q, C + 1]``, mask logits ``[B, Q, H / 4, W / 4]`` of every decoder layer."""
        head = self.model.sem_seg_head
        maps = self.model.backbone(images)
        queries = head.predictor.decode(maps[-1])
        outputs = head.predictor(queries, head.pixel_decoder(maps), self.query_embeds)
        return [Segments(*layer) for layer in zip(*outputs, strict=True)]

    def parameter_groups(self) -> list[dict[str, object]]:
        """The backbone at its own rate; norms and queries without weight decay."""
        undecayed = {
            id(p)
            for module in self.model.modules()
            if isinstance(module, _NORMS)
            for p in module.parameters(recurse=False)
        }
        settings = self.settings
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                slow = settings.backbone_factor if name.startswith("backbone.") else 1.0
                decay = 0.0 if id(parameter) in undecayed else settings.weight_decay
                groups.setdefault((settings.learning_rate * slow, decay), []).append(parameter)
        return parameter_groups(*((tensors, *key) for key, tensors in groups.items()))
