"""Training batches by position, and the joint random changes of a photo and its label map.

What a run sees next depends only on the seed and its position: a resumed run, or one with other
numbers of processes and workers, sees exactly the same images.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError, ZssegError
from zsseg_rt.evaluation.datasets.base import LabelMap, Sample, SegmentationDataset

Pair = tuple[Tensor, Tensor]
"""An image uint8 ``[3, h, w]`` and its labels ``[h, w]``, which v2 tells apart by their types."""


@dataclass(frozen=True, kw_only=True)
class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each with some probability.

    Brightness first; then contrast, saturation, hue or, with even odds, saturation, hue, contrast.
    The order and the defaults are those of mmsegmentation, with which ZegCLIP, CLIP-RC and
    ZegFormer were trained. There, saturation is that of HSV; here it is v2's.
    """

    brightness: float = 32.0  # Largest shift of the values, 0..255
    contrast: tuple[float, float] = (0.5, 1.5)  # Range of the factor of every value
    saturation: tuple[float, float] = (0.5, 1.5)  # Range of the factor; 0 leaves the grey image
    hue: int = 18  # Largest shift of the hue, in steps of two degrees
    probability: float = 0.5  # Probability that each property changes, 0..1

    def __post_init__(self) -> None:
        check_range(self, "brightness", most=255)
        check_range(self, "hue", most=90)
        check_range(self, "probability", most=1)
        _check_bounds(self, "contrast", "saturation")

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


def _check_bounds(settings: object, *names: str) -> None:
    for name in names:
        low, high = getattr(settings, name)
        if not 0 <= low <= high:
            raise ArgumentError(
                f"{name}: expected (low, high) with 0 <= low <= high, got {(low, high)}."
            )


@dataclass(frozen=True)
class Augmented:
    """One training image, with the fields of :class:`Batch`.

    Padding is at the bottom and right; labels there are the ignore label of the sample's dtype.
    """

    image: Tensor
    valid_hw: tuple[int, int]
    labels: Tensor
    name: str = ""
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class _RandomCrop:
    """Settings of both augmentations with random crops."""

    crop_hw: tuple[int, int] = (512, 512)  # Size of the result
    # A crop in which one class has this share of the annotated pixels or more, or that has only one
    # class, is drawn again. 1 switches that off
    max_class_share: float = 1.0
    crop_attempts: int = 10  # Crops that are tried; after the last, one more is drawn and used
    flip_probability: float = 0.5  # Of mirroring left and right
    # Colour change; None for none
    distortion: PhotometricDistortion | None = field(default_factory=PhotometricDistortion)
    pad_value: int = 0  # Of the padding, in all channels

    def __post_init__(self) -> None:
        check_range(self, "crop_hw", "crop_attempts", least=1)
        check_range(self, "max_class_share", least=1e-9, most=1)
        check_range(self, "flip_probability", most=1)
        check_range(self, "pad_value", most=255)

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
    which no class dominates), flip, change colours, pad; as in the official configurations.
    """

    scale: tuple[int, int] = (2048, 512)  # Longest and shortest side of the box at ratio 1
    ratio_range: tuple[float, float] = (0.5, 2.0)  # Range of the box's random ratio
    max_class_share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self, "ratio_range")
        low = self.ratio_range[0]
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
    """

    # Lengths to choose from; the defaults are those of VOC and ADE20K. For COCO-Stuff they are
    # int(0.1 * k * 640), k = 5..15, with crops of 640x640
    short_edges: tuple[int, ...] = tuple(int(0.1 * k * 512) for k in range(5, 21))
    max_long_edge: int = 2048  # A resized image's longest edge is at most this
    pad_value: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "short_edges", least=1)

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
    """The augmentation of ZeroSeg: shortest edge resized (bicubic), centre crop; no randomness."""

    crop_hw: tuple[int, int] = (224, 224)  # Size of the result
    short_edge: int = 256  # Length of the resized image's shortest edge, at least the crop's sides

    def __post_init__(self) -> None:
        check_range(self, "crop_hw", least=1)
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


Augmentation = FitInsideAugmentation | ShortEdgeAugmentation | CenterCropAugmentation
"""Turns a sample into a training image of size ``crop_hw``; equal generators give equal results.

Augmentations compare by value, so a run can be resumed only with the one it started with.
"""


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
    """Resize a photo, with half-pixel centres, and its labels, to nearest.

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


@dataclass(frozen=True)
class Batch:
    """Augmented images of one size with their labels."""

    images: Tensor  # RGB, uint8 [B, 3, H, W]; everything beyond valid_hw is padding
    valid_hw: Tensor  # Rows and columns of each image that are not padding, int64 [B, 2]
    # Class indices of the data set, all classes, int64 [B, H, W]; the data set's ignore_label where
    # nothing is annotated and in the padding
    labels: Tensor
    names: tuple[str, ...]  # Names of the images, for messages
    indices: tuple[int, ...] = ()  # Indices of the images in the data set

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; copies do not wait for pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; a torch ``DataLoader`` calls this by name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (change(self.images), change(self.valid_hw), change(self.labels))
        return Batch(*tensors, self.names, self.indices)


def normalize_images(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images float32 [B, 3, H, W], divided by 255 and normalised; padded pixels are 0 then."""
    images = batch.images
    shift = images.new_tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
    scale = images.new_tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
    normalized = (images.float() / 255 - shift) / scale
    return normalized.masked_fill(~valid_pixels(batch).unsqueeze(1), 0.0)


def valid_pixels(batch: Batch) -> Tensor:
    """Which pixels are not padding, bool ``[B, H, W]``."""
    rows, columns = (
        torch.arange(size, device=batch.images.device) for size in batch.images.shape[2:]
    )
    valid_rows = rows < batch.valid_hw[:, :1]
    valid_columns = columns < batch.valid_hw[:, 1:]
    return valid_rows.unsqueeze(2) & valid_columns.unsqueeze(1)


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Fork workers without OpenCV's threads: a child that stops them waits forever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def prepare_worker(worker: int) -> None:
    """Use one thread, and leave Ctrl-C to the main process, which can always end its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cv2.getNumThreads() != 1:  # a fresh process; a forked one has inherited this
        cv2.setNumThreads(1)
    torch.set_num_threads(1)


Key = tuple[int, int]  # running number of a sample in the training, the image's index in the set
# Streams of random numbers derived from one seed; never reuse a number.
_AUGMENTATION_STREAM = 1
_ORDER_STREAM = 2


class TrainingSamples(Dataset[Augmented]):
    """Augmented images by ``(position, index)``; equal keys give equal samples."""

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __getitem__(self, key: Key) -> Augmented:
        """Read and augment one image."""
        position, index = key
        rng = np.random.default_rng((self.seed, _AUGMENTATION_STREAM, position))
        sample = self.dataset[index]
        return replace(self.augmentation(sample, rng), name=sample.name, index=index)


def collate(samples: Sequence[Augmented]) -> Batch:
    """Stack samples of one size."""
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        valid_hw=torch.tensor([sample.valid_hw for sample in samples], dtype=torch.int64),
        labels=torch.stack([sample.labels for sample in samples]),
        names=tuple(sample.name for sample in samples),
        indices=tuple(sample.index for sample in samples),
    )


class EpochSampler(Sampler[list[Key]]):
    """The keys of this process's batches, epoch after epoch, each epoch in its own random order.

    All processes together see, step by step, the same ``batch_size`` samples for any number of
    processes; process ``p`` of ``P`` takes the ``p``-th of ``P`` equal parts. An epoch's last batch
    is dropped where it is not full, unless it is the only one. Iterating again starts again at
    ``start_position``.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        batch_size: int,
        start_position: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.length, self.seed, self.batch_size = length, seed, batch_size
        self.start_position = start_position
        self.process_index, self.num_processes = process_index, num_processes
        self.epoch_length = length - length % batch_size or length

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield one list of ``batch_size / num_processes`` keys per step."""
        part = self.batch_size // self.num_processes
        position = self.start_position
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            keys: list[Key] = []
            first = position + self.process_index * part
            for current in range(first, first + part):
                if current // self.epoch_length != epoch:
                    epoch = current // self.epoch_length
                    rng = np.random.default_rng((self.seed, _ORDER_STREAM, epoch))
                    order = rng.permutation(self.length)
                keys.append((current, int(order[current % self.epoch_length])))
            yield keys
            position += self.batch_size


def make_loader(
    samples: TrainingSamples,
    sampler: EpochSampler,
    *,
    num_workers: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Load batches in worker processes that live as long as the iterator.

    An error of the data set is raised as itself, not as a worker's traceback.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsItems(samples),
        batch_sampler=sampler,
        collate_fn=_first_error_or_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers > 0 else None,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # otherwise it draws from the one that a checkpoint saves
    )
    with one_opencv_thread():
        items = iter(loader)
    for item in items:
        if isinstance(item, ZssegError):
            try:
                raise item
            finally:  # no cycle through the traceback: workers end at once, not when collected
                del item, items
        yield item


class _ErrorsAsItems(Dataset[Any]):
    """Passes deliberate errors on as values: raised in a worker, they would arrive as text."""

    def __init__(self, samples: TrainingSamples) -> None:
        self.samples = samples

    def __getitem__(self, key: Key) -> Augmented | ZssegError:
        try:
            return self.samples[key]
        except ZssegError as error:
            return error


def _first_error_or_batch(items: Sequence[Any]) -> Batch | ZssegError:
    return next((item for item in items if isinstance(item, ZssegError)), None) or collate(items)
