"""The teacher's features of images, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.common.files import Cache, write_whole
from zsseg_rt.errors import ArgumentError, ShapeError, TrainingError
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.training.data.transforms import CenterCropAugmentation
from zsseg_rt.training.segmenters.torch_phrases import hash_weights
from zsseg_rt.training.tasks.zeroseg_views import ClipTeacher, TeacherViews

Features = npt.NDArray[np.float16]


def picture_key(image: Tensor) -> str:
    """Name an image by its pixels, uint8 ``[3, H, W]``."""
    pixels = image.cpu().contiguous()
    digest = hashlib.sha256(f"{list(pixels.shape)}".encode())
    digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Features by image, one file each: 30 views of ViT-L/14 take 46 kB, ImageNet-1k 59 GB.

    Files are written whole or not at all, so processes may share a folder. The checksum in each is
    of identity, image and values, so a damaged or misplaced one counts as missing.
    """

    def __init__(self, folder: str | Path, identity: str, shape: tuple[int, int]) -> None:
        self.shape = shape
        name = hashlib.sha256(f"{identity} {shape}".encode()).hexdigest()
        self.folder = Path(folder) / name[:16]
        self._stored = Cache(self.folder, name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            described = json.dumps({"identity": identity, "shape": list(shape)}, indent=2)
            write_whole(self.folder / "identity.json", described.encode())
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def read(self, key: str) -> Features | None:
        """Features float16 ``[views, D]`` of an image, or None."""
        num_bytes = 2 * self.shape[0] * self.shape[1]
        entry = self._stored.read(_file_name(key), max_bytes=num_bytes)
        if entry is None or len(entry.data) != num_bytes:
            return None
        return np.frombuffer(entry.data, "<f2").astype(np.float16).reshape(self.shape)

    def write(self, key: str, features: Features) -> None:
        """Store features float16 ``[views, D]`` of an image."""
        try:
            self._stored.write(_file_name(key), features.astype("<f2").tobytes())
        except OSError as error:
            raise _unwritable(self.folder / _file_name(key), error) from error


def _file_name(key: str) -> str:
    return f"{key[:2]}/{key[2:]}.features"


def _unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path}: expected a feature cache that can be written, got {error}. "
        "Free space, or choose another folder; what is cached stays valid."
    )


class TeacherFeatures(nn.Module):
    """The teacher's features of a batch: from the cache, else computed and stored.

    Computed features are rounded to float16 like cached ones, so training is the same in an epoch
    that computes them and in one that reads them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        views: TeacherViews | None = None,
        *,
        cache_folder: str | Path | None = None,
        from_original: bool = False,
        views_at_once: int = 240,
    ) -> None:
        super().__init__()
        if from_original and cache_folder is None:
            raise ArgumentError(
                "cache_folder: expected a folder, because from_original needs cached features, "
                "got None. Name one and call cache_features first."
            )
        if views_at_once < 1:
            raise ArgumentError(f"views_at_once: expected at least 1, got {views_at_once}.")
        self.teacher = ClipTeacher(encoder)
        self.views = views or TeacherViews()
        self.from_original, self.views_at_once = from_original, views_at_once
        self.embed_dim = self._probe()
        self.cache: FeatureCache | None = None
        if cache_folder is not None:
            shape = (self.views.count, self.embed_dim)
            self.cache = FeatureCache(cache_folder, self._identity(), shape)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Shapes:
            images: RGB, uint8 ``[B, 3, H, W]``.

        Returns:
            float32 ``[B, views, D]``, not normalised, on the images' device.
        """
        if self.cache is None:
            return self.compute(images)
        keys = [picture_key(image) for image in images]
        found = [self.cache.read(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        if missing and self.from_original:
            raise TrainingError(
                f"cache_folder: expected features of every image in {self.cache.folder}, got "
                f"none of {len(missing)} in this batch. Run cache_features with the same "
                "augmentation first."
            )
        if missing:
            computed = self.compute(images[missing]).half().cpu().numpy()
            for index, features in zip(missing, computed, strict=True):
                self.cache.write(keys[index], features)
                found[index] = features
        stacked = np.stack([features for features in found if features is not None])
        return torch.from_numpy(stacked).float().to(images.device)

    def compute(self, images: Tensor) -> Tensor:
        """Features without the cache, float32 ``[B, views, D]`` of float16 precision."""
        cut = self.views.cut(images).flatten(0, 1)
        parts = [self.teacher(part) for part in torch.split(cut, self.views_at_once)]
        features = torch.unflatten(torch.cat(parts), 0, (len(images), self.views.count))
        return features.half().float()

    def _probe(self) -> int:
        """Width D, from one grey view."""
        device = next(self.teacher.parameters()).device
        grey = torch.zeros(1, 3, self.views.size, self.views.size, device=device)
        embeds = self.teacher(grey)
        if embeds.ndim != 2:
            raise ShapeError(
                f"encoder: expected embeddings [N, D], got {list(embeds.shape)}. "
                "Use a CLIP image encoder."
            )
        return int(embeds.shape[1])

    def _identity(self) -> str:
        settings = asdict(self.views) | {"from_original": self.from_original}
        return f"{hash_weights(self.teacher)} {json.dumps(settings, sort_keys=True)}"


def cache_features(
    features: TeacherFeatures,
    dataset: SegmentationDataset,
    augmentation: CenterCropAugmentation,
    *,
    indices: Sequence[int] | None = None,
) -> int:
    """Compute and store the features of a data set ahead of training.

    Returns:
        How many were computed; the others were there already.
    """
    cache = features.cache
    if cache is None:
        raise ArgumentError("features: expected a cache folder, got none. Pass cache_folder.")
    device = next(features.parameters()).device
    rng = np.random.default_rng(0)  # the augmentation draws no random numbers
    computed = 0
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        crop = augmentation(sample, rng).image
        key = picture_key(crop)
        if cache.read(key) is not None:
            continue
        shown = _original_part(sample, augmentation) if features.from_original else crop
        found = features.compute(shown[None].to(device))[0]
        cache.write(key, found.half().cpu().numpy())
        computed += 1
    return computed


def _original_part(sample: Sample, augmentation: CenterCropAugmentation) -> Tensor:
    """What the crop shows, cut from the original image, uint8 ``[3, h, w]``."""
    shortest = min(sample.image.shape[:2])
    slices = []
    for length, crop in zip(sample.image.shape[:2], augmentation.crop_hw, strict=True):
        part = max(1, round(shortest * crop / augmentation.short_edge))
        start = (length - part) // 2
        slices.append(slice(start, start + part))
    pixels = np.ascontiguousarray(sample.image[slices[0], slices[1]].transpose(2, 0, 1))
    return torch.from_numpy(pixels)
