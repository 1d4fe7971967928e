"""ZegFormer's objective: match segments with the classes of an image, then compare the pairs.

Source:
    Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020; Cheng et al.,
    "Per-Pixel Classification is Not All You Need" (MaskFormer), NeurIPS 2021; Ding et al.,
    "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zsseg_rt.models.zegformer.decoder import Segments
from zsseg_rt.training.tasks.losses import negative_focal, positive_focal, process_mean


class ClassMasks(NamedTuple):
    """The targets from one image's annotation: a mask of each class that is present.

    Attributes:
        classes: int64 ``[G]``, ascending.
        masks: bool ``[G, H, W]``.
    """

    classes: Tensor
    masks: Tensor


class Match(NamedTuple):
    """Which segment is matched with which class mask of one image, in pairs.

    Attributes:
        segments: int64 ``[min(Q, G)]``, ascending.
        targets: int64, of the same length.
    """

    segments: Tensor
    targets: Tensor


class SegmentLosses(NamedTuple):
    """The three losses of one decoder layer, unweighted.

    Attributes:
        classification: Scalar.
        focal: Scalar.
        dice: Scalar.
    """

    classification: Tensor
    focal: Tensor
    dice: Tensor


@dataclass(frozen=True, kw_only=True)
class SegmentWeights:
    """Weights of the three losses and of the matching costs; the defaults are official.

    Attributes:
        classification: Weight of the classification.
        focal: Weight of the masks' focal loss.
        dice: Weight of the masks' dice loss.
        no_object: Weight of a segment without a class in the classification.
    """

    classification: float = 1.0
    focal: float = 20.0
    dice: float = 1.0
    no_object: float = 0.1


def class_masks(labels: Tensor, num_classes: int) -> list[ClassMasks]:
    """One binary mask for each class present in each image.

    Shapes:
        labels: int64 ``[B, H, W]``; a pixel outside ``[0, num_classes)`` belongs to no mask, which
            makes it a negative of every mask.

    Returns:
        Classes and masks of each image; an image may have none.
    """
    targets = []
    for picture in labels:
        classes = picture.unique()
        classes = classes[(classes >= 0) & (classes < num_classes)]
        targets.append(ClassMasks(classes, picture == classes.view(-1, 1, 1)))
    return targets


@torch.no_grad()
def match_segments(
    segments: Segments, targets: Sequence[ClassMasks], weights: SegmentWeights
) -> list[Match]:
    """Match each image's class masks with the segments that cost least in total.

    A pair's cost is the weighted sum of minus the class's probability, the focal loss and the dice
    loss of the mask, at the resolution of the segments; targets are resized by nearest neighbour.

    Shapes:
        segments: Logits ``[B, Q, C + 1]`` and mask logits ``[B, Q, h, w]``.

    Returns:
        The pairs of each image, on the segments' device.
    """
    matches = []
    for logits, masks, target in zip(*segments, targets, strict=True):
        cost = _matching_cost(logits.float(), masks.float(), target, weights)
        # A model that has diverged must yield non-finite losses, not an error here.
        pairs = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
        matches.append(Match(*(torch.from_numpy(rows).to(masks.device) for rows in pairs)))
    return matches


def _matching_cost(
    logits: Tensor, masks: Tensor, target: ClassMasks, weights: SegmentWeights
) -> Tensor:
    """``[Q, G]``."""
    probability = logits.softmax(dim=-1)[:, target.classes]
    size_hw = (masks.shape[1], masks.shape[2])
    wanted = F.interpolate(target.masks.unsqueeze(1).float(), size=size_hw, mode="nearest")
    z, y = masks.flatten(1), wanted.flatten(1)
    s = z.sigmoid()
    focal = (positive_focal(z) @ y.T + negative_focal(z) @ (1 - y).T) / z.shape[1]
    dice = 1 - (2 * s @ y.T + 1) / (s.sum(dim=1, keepdim=True) + y.sum(dim=1) + 1)
    return weights.focal * focal - weights.classification * probability + weights.dice * dice


def segment_losses(
    segments: Segments, targets: Sequence[ClassMasks], matches: Sequence[Match], *, no_object: float
) -> SegmentLosses:
    """Compare matched segments with their class masks; unmatched ones should be "no object".

    Mask logits are upsampled to the targets' resolution (bilinear). Both mask losses are sums over
    pairs divided by the number of class masks in the batch, averaged over processes and at least 1.

    Shapes:
        segments: Logits ``[B, Q, C + 1]`` and mask logits ``[B, Q, h, w]`` of one decoder layer.

    Returns:
        The losses. Without any class mask both mask losses are 0.
    """
    logits = segments.logits.float()
    num_masks = process_mean(logits.new_tensor(sum(len(t.classes) for t in targets)))
    normalizer = num_masks.clamp(min=1)
    focal, dice = _pair_losses(segments.masks, targets, matches)
    return SegmentLosses(
        classification=_classification(logits, targets, matches, no_object),
        focal=focal / normalizer,
        dice=dice / normalizer,
    )


def _classification(
    logits: Tensor, targets: Sequence[ClassMasks], matches: Sequence[Match], no_object: float
) -> Tensor:
    nothing = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], nothing, device=logits.device)
    for row, target, match in zip(wanted, targets, matches, strict=True):
        row[match.segments] = target.classes[match.targets]
    weight = logits.new_ones(nothing + 1)
    weight[nothing] = no_object
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)


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
