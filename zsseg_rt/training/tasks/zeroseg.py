"""Train ZeroSeg from images and a CLIP image encoder, without text and without labels.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.zeroseg.encoder import PatchMask, random_patch_mask, reconstruction_loss
from zsseg_rt.models.zeroseg.model import IMAGENET_MEAN, IMAGENET_STD, ZeroSeg
from zsseg_rt.training.data.loading import Batch, normalize_images
from zsseg_rt.training.tasks.labelled import TrainingTask, check_non_negative, parameter_groups
from zsseg_rt.training.tasks.zeroseg_features import TeacherFeatures


def scaled_learning_rate(base_learning_rate: float, batch_size: int) -> float:
    """MAE's rule: the base rate is for 256 images; the peak grows with the batch.

    Example:
        >>> scaled_learning_rate(1.5e-4, 4096)
        0.0024
    """
    return base_learning_rate * batch_size / 256


def view_loss(image_embed: Tensor, views: Tensor, *, normalize_targets: bool = True) -> Tensor:
    """L1 between the student's image embedding and every view: ``mean_j |z - v_j|``.

    The L1 is the mean over D; with unit targets times ``sqrt(D)``, which keeps it of order 1.

    Shapes:
        image_embed: ``[B, D]``.
        views: The teacher's features of all views, ``[B, n, D]``.
    """
    return _distances(image_embed[:, None], views, normalize_targets).mean()


def segment_matching_loss(
    segment_embeds: Tensor, views: Tensor, *, normalize_targets: bool = True
) -> Tensor:
    """L1 between every segment and the view nearest to it: ``mean_i min_j |g_i - v_j|``, j >= 2.

    The first view, the whole image, is not a candidate. The choice has no gradient.

    Shapes:
        segment_embeds: ``[B, G, D]``.
        views: The teacher's features of all views, ``[B, n, D]``, the whole image first.
    """
    if views.shape[1] < 2:
        raise ShapeError(
            f"views: expected the whole image and at least one cell, got {views.shape[1]} "
            "views. Use finer grids, or a matching weight of 0."
        )
    distances = _distances(segment_embeds, views[:, 1:], normalize_targets)
    return distances.amin(dim=2).mean()


def _distances(embeds: Tensor, views: Tensor, normalize_targets: bool) -> Tensor:
    """L1 of every pair, ``[B, G, n]``, in float32."""
    embeds, views = embeds.float(), views.detach().float()
    width = views.shape[2]
    with torch.autocast(embeds.device.type, enabled=False):
        targets = F.normalize(views, dim=2) if normalize_targets else views
        distances: Tensor = torch.cdist(embeds, targets, p=1)
    return distances / (width**0.5 if normalize_targets else width)


@dataclass(frozen=True, kw_only=True)
class ZeroSegSettings:
    """Settings of :class:`ZeroSegTask`.

    Source of the defaults: the paper, else MAE; loss weights, target normalisation and the scaling
    of the learning rate are not in the paper, see ``docs/zeroseg.md``.

    Attributes:
        mask_ratio: Share of patches that the encoder does not see, in ``[0, 1)``.
        reconstruction_weight: Weight of pixel reconstruction; 0 drops it and freezes its head.
        view_weight: Weight of the distance between the image and all views.
        matching_weight: Weight of the distance between segments and the views nearest to them.
        normalize_targets: Whether the teacher's features are divided by their norms.
        norm_pix_loss: Whether target patches are normalised, MAE's option.
        base_learning_rate: For 256 images; see :func:`scaled_learning_rate`.
        batch_size: Images per optimizer step, over all processes.
        weight_decay: For matrices and tokens; biases and norms have none.
    """

    mask_ratio: float = 0.6
    reconstruction_weight: float = 1.0
    view_weight: float = 1.0
    matching_weight: float = 1.0
    normalize_targets: bool = True
    norm_pix_loss: bool = False
    base_learning_rate: float = 1.5e-4
    batch_size: int = 4096
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        numbers = asdict(self)
        for name in ("mask_ratio", "normalize_targets", "norm_pix_loss"):
            del numbers[name]
        check_non_negative(**numbers)


class ZeroSegTask(TrainingTask):
    """ZeroSeg with its three losses; labels of a batch are not used.

    Optimizer and schedule of the paper: betas ``(0.9, 0.95)`` and no gradient clipping
    (:class:`zsseg_rt.training.loop.config.OptimizerConfig`),
    :func:`zsseg_rt.training.loop.config.cosine` with 20 of 80 epochs of warm-up.
    """

    needs_labels = False
    settings_class = ZeroSegSettings
    model: ZeroSeg

    def __init__(self, model: ZeroSeg, features: TeacherFeatures, **settings: Any) -> None:
        super().__init__(model)
        self.settings = made = ZeroSegSettings(**settings)
        self.features = features
        self.learning_rate = scaled_learning_rate(made.base_learning_rate, made.batch_size)
        self._check_fit()
        if model.decoder is not None and made.reconstruction_weight == 0:
            model.decoder.requires_grad_(False)
        if model.seg.tap is not None and made.matching_weight == 0:
            model.seg.tap.requires_grad_(False)
        if model.text_encoder is not None:
            model.text_encoder.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms; new masks are drawn in every call.

        Returns:
            ``reconstruction`` (unless switched off), ``views`` and ``segments``.
        """
        images = normalize_images(batch, IMAGENET_MEAN, IMAGENET_STD)
        self._check_images(images)
        patches, ratio = self.model.config.grid_side**2, self.settings.mask_ratio
        mask = random_patch_mask(len(images), patches, ratio, device=images.device)
        return self.losses(images, mask, self.features(batch.images, batch.indices))

    def losses(self, images: Tensor, mask: PatchMask, views: Tensor) -> dict[str, Tensor]:
        """Compute the weighted loss terms for given masks and features.

        Shapes:
            images: Normalised RGB planes, float ``[B, 3, H, W]``.
            views: The teacher's features, ``[B, n, D]``.
        """
        model, settings = self.model, self.settings
        tokens, unit = model.encoder(images, mask), settings.normalize_targets
        terms = {}
        if model.decoder is not None and settings.reconstruction_weight > 0:
            loss = reconstruction_loss(
                model.decoder(tokens, mask),
                images,
                mask,
                patch_size=model.config.patch_size,
                norm_pix_loss=settings.norm_pix_loss,
            )
            terms["reconstruction"] = settings.reconstruction_weight * loss
        output = model.seg(tokens.patch_tokens)
        overall = view_loss(output.image_embed, views, normalize_targets=unit)
        terms["views"] = settings.view_weight * overall
        if settings.matching_weight > 0:
            matched = segment_matching_loss(output.segment_embeds, views, normalize_targets=unit)
            terms["segments"] = settings.matching_weight * matched
        return terms

    def parameter_groups(self) -> list[dict[str, object]]:
        """Two groups with one rate: matrices and tokens; biases and norms, without decay."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        return parameter_groups(
            (matrices, self.learning_rate, self.settings.weight_decay),
            (vectors, self.learning_rate, 0.0),
        )

    def left_out(self) -> Mapping[str, nn.Module]:
        """The teacher, which can be loaded again from its own file or open_clip."""
        return {"features.teacher": self.features.teacher}

    def _check_fit(self) -> None:
        config = self.model.config
        random_patch_mask(
            1, config.grid_side**2, self.settings.mask_ratio, generator=torch.Generator()
        )
        if self.settings.reconstruction_weight > 0 and self.model.decoder is None:
            raise ArgumentError(
                f"reconstruction_weight: expected 0 for a model without a reconstruction head, got "
                f"{self.settings.reconstruction_weight}. Build the model with with_decoder=True."
            )
        if self.features.embed_dim != config.embed_dim:
            raise ArgumentError(
                f"features: expected a teacher with embeddings of {config.embed_dim}, the "
                f"student's embed_dim, got {self.features.embed_dim}. Build the student with "
                f"embed_dim={self.features.embed_dim}."
            )
        if self.settings.matching_weight > 0 and self.features.views.count < 2:
            raise ArgumentError(
                "matching_weight: expected 0 for views of the whole image alone, got "
                f"{self.settings.matching_weight}. Use finer grids, such as (1, 2, 3, 4)."
            )

    def _check_images(self, images: Tensor) -> None:
        side = self.model.config.grid_side * self.model.config.patch_size
        if tuple(images.shape[2:]) != (side, side):
            raise ShapeError(
                f"batch: expected images of {side}x{side}, got {images.shape[2]}x"
                f"{images.shape[3]}. Use CenterCropAugmentation(crop_hw=({side}, {side}))."
            )
