"""Joint random changes of a photo and its label map, as the papers use them in training.

Everything random comes from the generator that a call is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import LabelMap, Sample
from zsseg_rt.training.data.photometric import PhotometricDistortion

Picture = NDArray[np.uint8]
Pair = tuple[Picture, LabelMap]


class Augmented(NamedTuple):
    """One training image.

    Attributes:
        image: RGB, uint8 ``[3, h, w]``, contiguous.
        valid_hw: Rows and columns that are not padding; padding is at the bottom and right.
        labels: Class indices, int64 ``[h, w]``; the ignore label of the sample's dtype where
            nothing is annotated and in the padding.
    """

    image: Tensor
    valid_hw: tuple[int, int]
    labels: Tensor


class Augmentation(Protocol):
    """Turns a sample into a training image of size ``crop_hw``.

    Augmentations compare by value, so a run can be resumed only with the one it started with.
    """

    @property
    def crop_hw(self) -> tuple[int, int]:
        """Size of every result."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Augmented:
        """Augment; equal generators give equal results."""


@dataclass(frozen=True, kw_only=True)
class _RandomCrop:
    """Settings that both augmentations with random crops share; documented there."""

    crop_hw: tuple[int, int] = (512, 512)
    max_class_share: float = 1.0
    crop_attempts: int = 10
    flip_probability: float = 0.5
    distortion: PhotometricDistortion | None = field(default_factory=PhotometricDistortion)
    pad_value: int = 0

    def __post_init__(self) -> None:
        _check_crop(self.crop_hw)
        if not 0 < self.max_class_share <= 1:
            raise ArgumentError(
                f"max_class_share: expected above 0 and at most 1, got {self.max_class_share}."
            )
        if self.crop_attempts < 1:
            raise ArgumentError(f"crop_attempts: expected at least 1, got {self.crop_attempts}.")
        if not 0 <= self.flip_probability <= 1:
            raise ArgumentError(f"flip_probability: expected 0..1, got {self.flip_probability}.")
        if not 0 <= self.pad_value <= 255:
            raise ArgumentError(f"pad_value: expected 0..255, got {self.pad_value}.")

    def _crop(self, pair: Pair, rng: np.random.Generator) -> Pair:
        return random_crop(pair, self.crop_hw, self.max_class_share, self.crop_attempts, rng)

    def _flip(self, pair: Pair, rng: np.random.Generator) -> Pair:
        return random_flip(pair, self.flip_probability, rng)

    def _distort(self, pair: Pair, rng: np.random.Generator) -> Pair:
        return pair if self.distortion is None else (self.distortion(pair[0], rng), pair[1])


@dataclass(frozen=True, kw_only=True)
class FitInsideAugmentation(_RandomCrop):
    """The augmentation of ZegCLIP and CLIP-RC.

    Resize (fit inside a box of random scale, bilinear), crop (several attempts to find one in
    which no class dominates), flip, change colours, pad.

    Attributes:
        crop_hw: Size of the result.
        scale: Longest and shortest side of the box at ratio 1.
        ratio_range: Range of the box's random ratio.
        max_class_share: A crop in which one class has this share of the annotated pixels or more,
            or that has only one class, is drawn again. 1 switches that off.
        crop_attempts: Crops that are tried; after the last, one more is drawn and used.
        flip_probability: Probability of mirroring left and right.
        distortion: Colour change; None for none.
        pad_value: Value of the padding in all channels.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023; the training pipeline of the official configurations.
    """

    scale: tuple[int, int] = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.ratio_range
        if not 0 < low <= high:
            raise ArgumentError(
                f"ratio_range: expected (low, high) with 0 < low <= high, got {(low, high)}."
            )
        if min(int(side * low) for side in self.scale) < 1:
            raise ArgumentError(
                f"scale: expected sides of at least one pixel at ratio {low}, got {self.scale}."
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Augmented:
        """Augment; equal generators give equal results."""
        ratio = rng.uniform(*self.ratio_range)
        box = (int(self.scale[0] * ratio), int(self.scale[1] * ratio))
        size_hw = fit_inside_hw(_size_hw(sample), box)
        pair = resize_plain(sample.image, size_hw), resize_labels(sample.labels, size_hw)
        pair = self._distort(self._flip(self._crop(pair, rng), rng), rng)
        return finish(pair, self.crop_hw, self.pad_value)


@dataclass(frozen=True, kw_only=True)
class ShortEdgeAugmentation(_RandomCrop):
    """The augmentation of ZegFormer.

    Resize (shortest edge to a random choice, antialiased bilinear), crop, change colours, flip,
    pad. Officially, images are padded before normalisation, so ``pad_value`` applies there.

    Attributes:
        crop_hw: Size of the result.
        short_edges: Lengths to choose from; the defaults are those of VOC and ADE20K. For
            COCO-Stuff they are ``int(0.1 * k * 640)``, k = 5..15, with crops of 640x640.
        max_long_edge: A resized image's longest edge is at most this.
        max_class_share: As in :class:`FitInsideAugmentation`; officially off.
        crop_attempts: As in :class:`FitInsideAugmentation`.
        flip_probability: Probability of mirroring left and right.
        distortion: Colour change; None for none.
        pad_value: Value of the padding in all channels.

    Source:
        Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022; the mapper of the
        official configurations.
    """

    short_edges: tuple[int, ...] = tuple(int(0.1 * k * 512) for k in range(5, 21))
    max_long_edge: int = 2048
    pad_value: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.short_edges or min(self.short_edges) < 1:
            raise ArgumentError(
                f"short_edges: expected lengths of at least one pixel, got {self.short_edges}."
            )
        if self.max_long_edge < max(self.short_edges):
            raise ArgumentError(
                f"max_long_edge: expected at least the longest of short_edges, "
                f"{max(self.short_edges)}, got {self.max_long_edge}."
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Augmented:
        """Augment; equal generators give equal results."""
        edge = self.short_edges[rng.integers(len(self.short_edges))]
        size_hw = short_edge_hw(_size_hw(sample), edge, self.max_long_edge)
        pair = resize_antialiased(sample.image, size_hw), resize_labels(sample.labels, size_hw)
        pair = self._flip(self._distort(self._crop(pair, rng), rng), rng)
        return finish(pair, self.crop_hw, self.pad_value)


@dataclass(frozen=True, kw_only=True)
class CenterCropAugmentation:
    """The augmentation of ZeroSeg: shortest edge resized (bicubic), centre crop; no randomness.

    Attributes:
        crop_hw: Size of the result.
        short_edge: Length of the resized image's shortest edge, at least the crop's sides.

    Source:
        Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
        Distillation Only", ICCV 2023, section 4.1.
    """

    crop_hw: tuple[int, int] = (224, 224)
    short_edge: int = 256

    def __post_init__(self) -> None:
        _check_crop(self.crop_hw)
        if self.short_edge < max(self.crop_hw):
            raise ArgumentError(
                f"short_edge: expected at least the crop's sides {self.crop_hw}, "
                f"got {self.short_edge}."
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Augmented:
        """Crop; the generator is not used."""
        size_hw = short_edge_hw(_size_hw(sample), self.short_edge)
        image = resize_antialiased(sample.image, size_hw, bicubic=True)
        labels = resize_labels(sample.labels, size_hw)
        top = round((size_hw[0] - self.crop_hw[0]) / 2)
        left = round((size_hw[1] - self.crop_hw[1]) / 2)
        return finish(crop_at((image, labels), top, left, self.crop_hw), self.crop_hw, 0)


def fit_inside_hw(image_hw: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Size that keeps the aspect ratio, with no side longer than the box's of the same rank.

    Returns:
        Height and width, at least 1, rounded to nearest.
    """
    factor = min(max(box) / max(image_hw), min(box) / min(image_hw))
    return max(int(image_hw[0] * factor + 0.5), 1), max(int(image_hw[1] * factor + 0.5), 1)


def short_edge_hw(
    image_hw: tuple[int, int], short_edge: int, max_long_edge: int | None = None
) -> tuple[int, int]:
    """Size that keeps the aspect ratio, by shortest edge; smaller if the longest is too long."""
    height, width = image_hw
    factor = short_edge / min(image_hw)
    if height < width:
        new_hw = (float(short_edge), factor * width)
    else:
        new_hw = (factor * height, float(short_edge))
    if max_long_edge is not None and max(new_hw) > max_long_edge:
        shrink = max_long_edge / max(new_hw)
        new_hw = (new_hw[0] * shrink, new_hw[1] * shrink)
    return max(int(new_hw[0] + 0.5), 1), max(int(new_hw[1] + 0.5), 1)


def resize_plain(image: Picture, size_hw: tuple[int, int]) -> Picture:
    """Bilinear with half-pixel centres and no antialiasing, rounded to uint8."""
    resized: Picture = cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    return resized


def resize_antialiased(image: Picture, size_hw: tuple[int, int], bicubic: bool = False) -> Picture:
    """Bilinear or bicubic with antialiasing: Pillow's definition to within one step of uint8."""
    mode = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    picture = tv_tensors.Image(_as_tensor(image).permute(2, 0, 1))
    resized: Picture = (
        F.resize(picture, list(size_hw), interpolation=mode, antialias=True)
        .permute(1, 2, 0)
        .numpy()
    )
    return resized


def resize_labels(labels: LabelMap, size_hw: tuple[int, int]) -> LabelMap:
    """Take the label at ``floor(target * source_size / target_size)``."""
    resized: LabelMap = cv2.resize(labels, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    return resized


def crop_at(pair: Pair, top: int, left: int, crop_hw: tuple[int, int]) -> Pair:
    """Cut out at most ``crop_hw`` rows and columns; returns views of the input."""
    rows, columns = slice(top, top + crop_hw[0]), slice(left, left + crop_hw[1])
    return pair[0][rows, columns], pair[1][rows, columns]


def random_crop(
    pair: Pair,
    crop_hw: tuple[int, int],
    max_class_share: float,
    attempts: int,
    rng: np.random.Generator,
) -> Pair:
    """Crop at a uniform position, redrawn while one class dominates or is the only one."""
    height, width = pair[1].shape
    last_top, last_left = max(height - crop_hw[0], 0), max(width - crop_hw[1], 0)

    def draw() -> Pair:
        top = int(rng.integers(last_top, endpoint=True))
        return crop_at(pair, top, int(rng.integers(last_left, endpoint=True)), crop_hw)

    crop = draw()
    if max_class_share >= 1:
        return crop
    for _ in range(attempts):
        if not _one_class_dominates(crop[1], max_class_share):
            break
        crop = draw()
    return crop


def random_flip(pair: Pair, probability: float, rng: np.random.Generator) -> Pair:
    """Mirror left and right."""
    if rng.random() >= probability:
        return pair
    return cv2.flip(pair[0], 1), cv2.flip(pair[1], 1)


def finish(pair: Pair, crop_hw: tuple[int, int], pad_value: int) -> Augmented:
    """Pad at the bottom and right to ``crop_hw`` and lay the image out for a model."""
    labels = _as_tensor(pair[1])
    height, width = labels.shape
    image = torch.empty((3, height, width), dtype=torch.uint8)
    cv2.mixChannels([pair[0]], list(image.numpy()), [0, 0, 1, 1, 2, 2])
    indices = labels.to(torch.int64)
    missing = [0, 0, crop_hw[1] - width, crop_hw[0] - height]
    if any(missing):
        ignore = int(np.iinfo(pair[1].dtype).max)
        image = F.pad(tv_tensors.Image(image), missing, fill=pad_value).as_subclass(Tensor)
        indices = F.pad(tv_tensors.Mask(indices), missing, fill=ignore).as_subclass(Tensor)
    return Augmented(image, (height, width), indices)


def _one_class_dominates(labels: LabelMap, max_share: float) -> bool:
    bins = int(np.iinfo(labels.dtype).max) + 1
    counts = cv2.calcHist([labels], [0], None, [bins], [0, bins]).ravel()[:-1]
    present = counts[counts > 0]
    return len(present) <= 1 or bool(present.max() / present.sum() >= max_share)


def _as_tensor(array: Picture | LabelMap) -> Tensor:
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def _size_hw(sample: Sample) -> tuple[int, int]:
    return sample.image.shape[0], sample.image.shape[1]


def _check_crop(crop_hw: tuple[int, int]) -> None:
    if min(crop_hw) < 1:
        raise ArgumentError(f"crop_hw: expected sides of at least one pixel, got {crop_hw}.")
