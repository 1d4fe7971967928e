"""Joint random changes of a photo and its label map, as the papers use them in training.

The steps are those of ``torchvision.transforms.v2``. They draw from torch's generator, which is
seeded by the generator that a call is given, and afterwards continues as if nothing was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import LabelMap, Sample

Pair = tuple[Tensor, Tensor]
"""An image uint8 ``[3, h, w]`` and its labels ``[h, w]``, which v2 tells apart by their types."""


@dataclass(frozen=True, kw_only=True)
class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each with some probability.

    Brightness first; then contrast, saturation, hue or, with even odds, saturation, hue, contrast.
    Values are clipped to 0..255 and truncated after every step.

    Source:
        Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016; the order and the defaults are
        those of mmsegmentation, with which ZegCLIP, CLIP-RC and ZegFormer were trained. There,
        saturation is that of HSV; here it is v2's, which keeps the grey value.
    """

    brightness: float = 32.0  # Largest shift of the values, 0..255
    contrast: tuple[float, float] = (0.5, 1.5)  # Range of the factor of every value
    saturation: tuple[float, float] = (0.5, 1.5)  # Range of the factor; 0 leaves the grey image
    hue: int = 18  # Largest shift of the hue, in steps of two degrees
    probability: float = 0.5  # Probability that each property changes, 0..1

    def __post_init__(self) -> None:
        _check_limits(self, brightness=255, hue=90, probability=1)
        for name, (low, high) in (("contrast", self.contrast), ("saturation", self.saturation)):
            if not 0 <= low <= high:
                raise ArgumentError(
                    f"{name}: expected factors (low, high) with 0 <= low <= high, "
                    f"got {(low, high)}."
                )

    def __call__(self, image: Tensor) -> Tensor:
        """Change an RGB image uint8 ``[3, h, w]`` by torch's generator."""

        def sometimes(change: Any) -> Any:
            return v2.RandomApply([change], p=self.probability)

        # v2 calls a factor of every value brightness; its contrast keeps the mean
        contrast = sometimes(v2.ColorJitter(brightness=self.contrast))
        colours = [
            sometimes(v2.ColorJitter(saturation=self.saturation)),
            sometimes(v2.ColorJitter(hue=self.hue / 180)),
        ]
        orders = [v2.Compose([contrast, *colours]), v2.Compose([*colours, contrast])]
        changed: Tensor = v2.Compose([sometimes(self._shift), v2.RandomChoice(orders)])(image)
        return changed

    def _shift(self, image: Tensor) -> Tensor:
        shift = torch.empty(()).uniform_(-self.brightness, self.brightness)
        shifted: Tensor = tv_tensors.wrap((image + shift).clamp(0, 255).to(torch.uint8), like=image)
        return shifted


class Augmented(NamedTuple):
    """One training image: as of :class:`zsseg_rt.training.data.loading.Batch`, without the batch.

    Padding is at the bottom and right; labels there are the ignore label of the sample's dtype.
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
        _check_limits(self, flip_probability=1, pad_value=255)

    def _crop(self, pair: Pair, ignore: int) -> Pair:
        return random_crop(pair, self.crop_hw, self.max_class_share, self.crop_attempts, ignore)

    def _flip(self, pair: Pair) -> Pair:
        flipped: Pair = v2.RandomHorizontalFlip(self.flip_probability)(pair)
        return flipped

    def _distort(self, pair: Pair) -> Pair:
        return pair if self.distortion is None else (self.distortion(pair[0]), pair[1])


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
        ignore = int(np.iinfo(sample.labels.dtype).max)
        with seeded(rng):
            ratio = float(torch.empty((), dtype=torch.float64).uniform_(*self.ratio_range))
            box = (int(self.scale[0] * ratio), int(self.scale[1] * ratio))
            pair = resize(sample, fit_inside_hw(_size_hw(sample), box), antialias=False)
            pair = self._distort(self._flip(self._crop(pair, ignore)))
        return finish(pair, self.crop_hw, self.pad_value, ignore)


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
        ignore = int(np.iinfo(sample.labels.dtype).max)
        with seeded(rng):
            edge = self.short_edges[_integer_up_to(len(self.short_edges) - 1)]
            pair = resize(sample, short_edge_hw(_size_hw(sample), edge, self.max_long_edge))
            pair = self._flip(self._distort(self._crop(pair, ignore)))
        return finish(pair, self.crop_hw, self.pad_value, ignore)


@dataclass(frozen=True, kw_only=True)
class CenterCropAugmentation:
    """The augmentation of ZeroSeg: shortest edge resized (bicubic), centre crop; no randomness.

    Source:
        Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
        Distillation Only", ICCV 2023, section 4.1.
    """

    crop_hw: tuple[int, int] = (224, 224)  # Size of the result
    short_edge: int = 256  # Length of the resized image's shortest edge, at least the crop's sides

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
        pair = resize(sample, size_hw, bicubic=True)
        image, labels = (F.center_crop(part, list(self.crop_hw)) for part in pair)
        return finish((image, labels), self.crop_hw, 0, int(np.iinfo(sample.labels.dtype).max))


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Let torch's generator draw what ``rng`` decides inside, and go on as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        yield


def fit_inside_hw(image_hw: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Size that keeps the aspect ratio, with no side longer than the box's of the same rank."""
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


def resize(
    sample: Sample, size_hw: tuple[int, int], *, antialias: bool = True, bicubic: bool = False
) -> Pair:
    """Resize a photo, bilinear or bicubic with half-pixel centres, and its labels, to nearest.

    With antialiasing, it is Pillow's definition to within one step of uint8. A label is the one at
    ``floor(target * source_size / target_size)``.
    """
    mode = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    image = tv_tensors.Image(_as_tensor(sample.image).permute(2, 0, 1))
    labels = tv_tensors.Mask(_as_tensor(sample.labels))
    return (
        F.resize(image, list(size_hw), interpolation=mode, antialias=antialias),
        F.resize(labels, list(size_hw)),
    )


def random_crop(
    pair: Pair, crop_hw: tuple[int, int], max_class_share: float, attempts: int, ignore: int
) -> Pair:
    """Crop at a uniform position, redrawn while one class dominates or is the only one."""
    height, width = pair[1].shape
    rows, columns = min(crop_hw[0], height), min(crop_hw[1], width)

    def draw() -> tuple[int, int, int, int]:
        return _integer_up_to(height - rows), _integer_up_to(width - columns), rows, columns

    place = draw()
    if max_class_share < 1:
        for _ in range(attempts):
            if not _one_class_dominates(F.crop(pair[1], *place), max_class_share, ignore):
                break
            place = draw()
    return F.crop(pair[0], *place), F.crop(pair[1], *place)


def finish(pair: Pair, crop_hw: tuple[int, int], pad_value: int, ignore: int) -> Augmented:
    """Pad at the bottom and right to ``crop_hw``, and lay image and labels out for a model."""
    height, width = pair[1].shape
    missing = [0, 0, crop_hw[1] - width, crop_hw[0] - height]
    image = F.pad(pair[0], missing, fill=pad_value).as_subclass(Tensor).contiguous()
    labels = F.pad(pair[1], missing, fill=ignore).as_subclass(Tensor).to(torch.int64)
    return Augmented(image, (height, width), labels.contiguous())


def _one_class_dominates(labels: Tensor, max_share: float, ignore: int) -> bool:
    counts = torch.bincount(labels[labels != ignore].flatten())
    present = counts[counts > 0]
    return len(present) <= 1 or bool(present.max() / present.sum() >= max_share)


def _integer_up_to(most: int) -> int:
    return int(torch.randint(most + 1, ()))


def _as_tensor(array: NDArray[np.uint8] | LabelMap) -> Tensor:
    wide = array.astype(np.int32) if array.dtype == np.uint16 else np.ascontiguousarray(array)
    return torch.from_numpy(wide if wide.flags.writeable else wide.copy())


def _size_hw(sample: Sample) -> tuple[int, int]:
    return sample.image.shape[0], sample.image.shape[1]


def _check_limits(settings: object, **limits: int) -> None:
    for name, limit in limits.items():
        if not 0 <= getattr(settings, name) <= limit:
            raise ArgumentError(f"{name}: expected 0..{limit}, got {getattr(settings, name)}.")


def _check_crop(crop_hw: tuple[int, int]) -> None:
    if min(crop_hw) < 1:
        raise ArgumentError(f"crop_hw: expected sides of at least one pixel, got {crop_hw}.")
