"""The losses of pixels.

Labels index the text rows used as queries. A label outside ``[0, C)`` names none of them: for the
mask losses such a pixel is a negative of every class, as in the official code; cross entropy leaves
it out.

Source:
    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Milletari et al., "V-Net", 3DV
    2016; Zhou et al., "ZegCLIP", CVPR 2023, for the normaliser; Zhang et al., "Exploring Regional
    Clues in CLIP", CVPR 2024, for the recovery losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.25  # weight of positives in the focal loss; negatives get the rest


def process_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself if there is only one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def mask_losses(mask_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of one mask per class, as ZegCLIP and CLIP-RC are trained.

    With p the sigmoid of the logits, y whether a pixel has the class, and M the number of classes
    present, summed over the batch, averaged over processes and at least 1:

    - focal: the sum over images and all classes of the mean over pixels of
      ``a (1 - p_t)^2 BCE(p, y)``, divided by M; a is 0.25 and p_t is p where y, else 0.75 and
      1 - p.
    - dice: the sum over images and the classes present in each of
      ``1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1)``, divided by M.

    A batch without any class still has a focal loss; its dice loss is 0. Logits are float
    [B, C, H, W], labels int64 [B, H, W].
    """
    logits, labels = mask_logits.float().flatten(2), labels.flatten(1)
    num_classes = logits.shape[1]
    classes, positive = _classes_of(labels, num_classes)
    counts = _sum_by_class(positive.to(logits), classes, num_classes)
    present = counts > 0
    normalizer = process_mean(present.sum().to(logits)).clamp(min=1)

    labelled = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    at_labels = torch.where(positive, positive_focal(labelled), negative_focal(labelled))
    focal = negative_focal(logits).scatter_(1, classes.unsqueeze(1), at_labels.unsqueeze(1))
    probabilities = logits.sigmoid()
    overlaps = _sum_by_class(labelled.sigmoid() * positive, classes, num_classes)
    ratios = (2 * overlaps + 1) / (probabilities.sum(dim=2) + counts + 1)
    return focal.mean(dim=2).sum() / normalizer, ((1 - ratios) * present).sum() / normalizer


def positive_focal(logits: Tensor) -> Tensor:
    """Focal loss of each logit where the class is present."""
    return ALPHA * (-logits).sigmoid() ** 2 * F.softplus(-logits)


def negative_focal(logits: Tensor) -> Tensor:
    """Focal loss of each logit where the class is absent."""
    return (1 - ALPHA) * logits.sigmoid() ** 2 * F.softplus(logits)


def _classes_of(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels, set to 0 where they name no class, and a mask of where they do name one."""
    positive = (labels >= 0) & (labels < num_classes)
    return labels.masked_fill(~positive, 0), positive


def _sum_by_class(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Add up ``[B, N]`` values by their class, ``[B, C]``."""
    return values.new_zeros(len(values), num_classes).scatter_add(1, classes, values)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy of logits [B, C, H, W], the mean over labelled pixels; or 0.

    Labels are int64 [B, H, W]; those outside ``[0, C)`` do not count.
    """
    classes, labelled = _classes_of(labels, logits.shape[1])
    classes = classes.masked_fill(~labelled, -100)  # which torch leaves out
    total = F.cross_entropy(logits.float(), classes, reduction="sum")
    return total / process_mean(labelled.sum().to(total)).clamp(min=1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross entropy of logits [B, C, H, W], the mean over pixels and classes.

    CAT-Seg's. A label outside ``[0, C)`` is a negative of every class, as officially.
    """
    logits = logits.float()
    classes, labelled = _classes_of(labels, logits.shape[1])
    at_labels = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    return F.softplus(logits).mean() - (at_labels * labelled).sum() / logits.numel()


def recovery_loss(recovered: Tensor, target: Tensor) -> Tensor:
    """CLIP-RC's recovery loss: the mean absolute error; no gradient flows into the target."""
    return F.l1_loss(recovered.float(), target.detach().float())
