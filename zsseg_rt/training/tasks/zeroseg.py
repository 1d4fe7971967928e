"""Train ZeroSeg from images and a CLIP image encoder, without text and without labels.

What the teacher sees of an image is computed once and kept on disk: grids of 1x1 to 4x4, every cell
at full input size.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023; section 3.2 for the views.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError, ShapeError, TrainingError
from zsseg_rt.models.zeroseg.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PatchMask,
    ZeroSeg,
    random_patch_mask,
    reconstruction_loss,
)
from zsseg_rt.torch_files.checkpoints import hash_weights
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD
from zsseg_rt.training.data import Batch, normalize_images
from zsseg_rt.training.tasks.labelled import TrainingTask, parameter_groups

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels; bottom and right are exclusive."""


@dataclass(frozen=True, kw_only=True)
class TeacherViews:
    """Which views of an image the teacher sees, and how."""

    # Cells per side of each grid, ascending, the whole image first. The paper's best are 1, 2, 3
    # and 4
    grids: tuple[int, ...] = (1, 2, 3, 4)
    size: int = 224  # Side of a view, in pixels: the teacher's input
    image_mean: tuple[float, float, float] = CLIP_MEAN  # The teacher's mean of R, G, B, in [0, 1]
    # The teacher's standard deviation of R, G, B, in [0, 1]
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if not self.grids or self.grids[0] != 1 or list(self.grids) != sorted(set(self.grids)):
            raise ArgumentError(
                f"grids: expected ascending numbers that begin with 1, got {self.grids}. "
                "The paper's best are (1, 2, 3, 4)."
            )
        check_range(self, "size", least=1)

    @property
    def count(self) -> int:
        """Number of views per image: 30 for grids of 1 to 4."""
        return sum(side * side for side in self.grids)

    def boxes(self, size_hw: tuple[int, int]) -> tuple[Box, ...]:
        """Where the views are, grid by grid in raster order; a grid covers every pixel once."""
        if min(size_hw) < self.grids[-1]:
            raise ShapeError(
                f"images: expected at least {self.grids[-1]} pixels per side, got "
                f"{size_hw[0]}x{size_hw[1]}. Use larger images or coarser grids."
            )
        boxes = []
        for side in self.grids:
            edges = ([round(i * length / side) for i in range(side + 1)] for length in size_hw)
            rows, columns = (list(itertools.pairwise(along)) for along in edges)
            boxes += [(*rows[i], *columns[j]) for i in range(side) for j in range(side)]
        return tuple(boxes)

    def cut(self, images: Tensor) -> Tensor:
        """The normalised views of images uint8 [B, 3, H, W], float32 [B, count, 3, size, size]."""
        pixels = images.float() / 255
        size_hw, views = (self.size, self.size), []
        for top, bottom, left, right in self.boxes((images.shape[2], images.shape[3])):
            cell = pixels[:, :, top:bottom, left:right]
            resized = F.interpolate(cell, size=size_hw, mode="bicubic", antialias=True)
            views.append(resized.clamp(0, 1))  # bicubic overshoots at edges
        mean = pixels.new_tensor(self.image_mean).view(3, 1, 1)
        std = pixels.new_tensor(self.image_std).view(3, 1, 1)
        return (torch.stack(views, dim=1) - mean) / std


class FeatureFile:
    """Features by the index of the image: rows of one sparse file, read by ``numpy.memmap``.

    30 views of ViT-L/14 take 46 kB, ImageNet-1k 59 GB. A row begins with a SHA-256 of identity,
    pixels and values: one that is damaged or another image's counts as missing. Processes may share
    the file.
    """

    def __init__(self, folder: str | Path, identity: Any, num_images: int, shape: Any) -> None:
        self._identity = json.dumps([identity, num_images, shape]).encode()
        self._row = np.dtype([("sha256", "u1", 32), ("values", "<f2", shape)])
        self.path = Path(folder) / f"{hashlib.sha256(self._identity).hexdigest()[:16]}.features"
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, num_images * self._row.itemsize)
            self._rows = np.memmap(self.path, self._row, mode="r", shape=(num_images,))

    def read(self, index: int, image: Tensor) -> npt.NDArray[np.float16] | None:
        """Features float16 [views, D] of an image uint8 [3, H, W], or None."""
        row = self._rows[index]
        sha256, values = row["sha256"].tobytes(), row["values"].astype(np.float16)
        return values if sha256 == self._checksum(image, values) else None

    def write(self, index: int, image: Tensor, values: npt.NDArray[np.float16]) -> None:
        """Store features float16 [views, D] of an image."""
        row = self._checksum(image, values) + values.astype("<f2").tobytes()
        # on a full disk, writing to a map ends a process
        with self._written(), self.path.open("r+b") as file:
            file.seek(index * self._row.itemsize)
            file.write(row)

    def _checksum(self, image: Tensor, values: npt.NDArray[np.float16]) -> bytes:
        digest = hashlib.sha256(self._identity + f" {list(image.shape)} ".encode())
        digest.update(image.cpu().contiguous().numpy().tobytes())
        digest.update(values.astype("<f2").tobytes())
        return digest.digest()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path}: expected a feature cache that can be written, got {error}. "
                "Free space, or choose another folder; what is cached stays valid."
            ) from error


class TeacherFeatures(nn.Module):
    """A frozen CLIP image tower's features of a batch: from the cache, else computed and stored.

    Computed features are rounded to float16 like cached ones, so training is the same in an epoch
    that computes them and in one that reads them. ``num_images`` is the data set's length.
    """

    def __init__(
        self,
        encoder: nn.Module,
        views: TeacherViews | None = None,
        *,
        cache_folder: str | Path | None = None,
        num_images: int = 0,
        views_at_once: int = 240,
    ) -> None:
        super().__init__()
        if cache_folder is not None and num_images < 1:
            raise ArgumentError(
                f"num_images: expected the number of images to cache, got {num_images}. "
                "Give the length of the data set."
            )
        self.teacher = encoder.requires_grad_(False)
        self.train()
        self.views = views or TeacherViews()
        self.views_at_once = views_at_once
        self.embed_dim = self._embed(torch.zeros(1, 3, self.views.size, self.views.size)).shape[1]
        self.cache: FeatureFile | None = None
        if cache_folder is not None:
            identity = [hash_weights(self.teacher), asdict(self.views)]
            shape = (self.views.count, self.embed_dim)
            self.cache = FeatureFile(cache_folder, identity, num_images, shape)

    def train(self, mode: bool = True) -> TeacherFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, indices: Sequence[int] = ()) -> Tensor:
        """Features of images uint8 [B, 3, H, W]: float32 [B, views, D], not normalised."""
        if self.cache is None:
            return self.compute(images)
        places = list(zip(indices, images, strict=True))
        rows = [self.cache.read(*place) for place in places]
        missing = [number for number, values in enumerate(rows) if values is None]
        if missing:
            computed = self.compute(images[missing]).half().cpu().numpy()
            for number, values in zip(missing, computed, strict=True):
                self.cache.write(*places[number], values)
                rows[number] = values
        stacked = np.stack([values for values in rows if values is not None])
        return torch.from_numpy(stacked).float().to(images.device)

    def compute(self, images: Tensor) -> Tensor:
        """Features without the cache, float32 [B, views, D] of float16 precision."""
        cut = self.views.cut(images).flatten(0, 1)
        parts = [self._embed(part) for part in torch.split(cut, self.views_at_once)]
        features = torch.unflatten(torch.cat(parts), 0, (len(images), self.views.count))
        return features.half().float()

    @torch.no_grad()
    def _embed(self, views: Tensor) -> Tensor:
        """Embed views float ``[N, 3, size, size]``; float32 ``[N, D]``, not normalised."""
        teacher: Any = self.teacher
        like = next(teacher.parameters())
        with torch.autocast(like.device.type, enabled=False):
            embeds: Tensor = teacher.encode_image(views.to(like)).float()
        return embeds


def scaled_learning_rate(base_learning_rate: float, batch_size: int) -> float:
    """MAE's rule: the base rate is for 256 images; the peak grows with the batch."""
    return base_learning_rate * batch_size / 256


def view_loss(image_embed: Tensor, views: Tensor, *, normalize_targets: bool = True) -> Tensor:
    """L1 between the student's image embedding [B, D] and all views [B, n, D]: mean |z - v|.

    The L1 is the mean over D; with unit targets times ``sqrt(D)``, which keeps it of order 1.
    """
    return _distances(image_embed[:, None], views, normalize_targets).mean()


def segment_matching_loss(
    segment_embeds: Tensor, views: Tensor, *, normalize_targets: bool = True
) -> Tensor:
    """L1 between segments [B, G, D] and the nearest of the views [B, n, D]: mean min |g - v|.

    The first view, the whole image, is not a candidate. The choice has no gradient.
    """
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
    """Settings of ZeroSegTask: the paper's, else MAE's; weights and target norms are ours."""

    mask_ratio: float = 0.6  # Share of patches that the encoder does not see, in [0, 1)
    # Weight of pixel reconstruction; 0 drops it and freezes its head
    reconstruction_weight: float = 1.0
    view_weight: float = 1.0  # Weight of the distance between the image and all views
    # Weight of the distance between segments and the views nearest to them
    matching_weight: float = 1.0
    normalize_targets: bool = True  # Whether the teacher's features are divided by their norms
    base_learning_rate: float = 1.5e-4  # For 256 images; see :func:`scaled_learning_rate`
    batch_size: int = 4096  # Images per optimizer step, over all processes
    weight_decay: float = 0.05  # For matrices and tokens; biases and norms have none

    def __post_init__(self) -> None:
        check_range(self, "reconstruction_weight", "view_weight", "matching_weight")
        check_range(self, "base_learning_rate", "batch_size", "weight_decay")


class ZeroSegTask(TrainingTask):
    """ZeroSeg with its three losses; labels of a batch are not used.

    Optimizer and schedule of the paper: betas (0.9, 0.95), no gradient clipping, and a cosine with
    20 of 80 epochs of warm-up.
    """

    needs_labels = False
    settings_class = ZeroSegSettings
    model: ZeroSeg

    def __init__(self, model: ZeroSeg, features: TeacherFeatures, **settings: Any) -> None:
        super().__init__(model)
        self.settings = options = ZeroSegSettings(**settings)
        self.features = features
        self.learning_rate = scaled_learning_rate(options.base_learning_rate, options.batch_size)
        self._check_fit()
        if model.decoder is not None and options.reconstruction_weight == 0:
            model.decoder.requires_grad_(False)
        if model.text_encoder is not None:
            model.text_encoder.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms; new masks are drawn in every call."""
        images = normalize_images(batch, IMAGENET_MEAN, IMAGENET_STD)
        self._check_images(images)
        patches, ratio = self.model.config.grid_side**2, self.settings.mask_ratio
        mask = random_patch_mask(len(images), patches, ratio, device=images.device)
        return self.losses(images, mask, self.features(batch.images, batch.indices))

    def losses(self, images: Tensor, mask: PatchMask, views: Tensor) -> dict[str, Tensor]:
        """The loss terms of normalised images [B, 3, H, W] and the teacher's views [B, n, D]."""
        model, settings = self.model, self.settings
        tokens, unit = model.encoder(images, mask), settings.normalize_targets
        terms = {}
        if model.decoder is not None and settings.reconstruction_weight > 0:
            pixels, side = model.decoder(tokens, mask), model.config.patch_size
            loss = reconstruction_loss(pixels, images, mask, patch_size=side)
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
