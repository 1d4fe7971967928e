"""Training batches by position: what a run sees next depends only on the seed and its position.

There is no worker state: a resumed run, or one with other numbers of processes and workers, sees
exactly the same images.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zsseg_rt.common.process import usable_cpus
from zsseg_rt.errors import ArgumentError, ZssegError
from zsseg_rt.evaluation.datasets.base import SegmentationDataset
from zsseg_rt.training.data.transforms import Augmentation


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
    """Divide by 255, normalise, and set padded pixels to 0 (after normalisation).

    Returns:
        float32 ``[B, 3, H, W]``.
    """
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


Key = tuple[int, int]
"""Running number of a sample in the whole training, and the image's index in the data set."""

# Streams of random numbers derived from one seed; never reuse a number.
_AUGMENTATION_STREAM = 1
_ORDER_STREAM = 2


@dataclass(frozen=True)
class TrainingSample:
    """One augmented image, with the fields of :class:`Batch`."""

    image: Tensor
    valid_hw: tuple[int, int]
    labels: Tensor
    name: str
    index: int


class TrainingSamples(Dataset[TrainingSample]):
    """Augmented images by ``(position, index)``; equal keys give equal samples."""

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        _check_seed(seed)
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key: Key) -> TrainingSample:
        """Read and augment one image."""
        position, index = key
        rng = np.random.default_rng((self.seed, _AUGMENTATION_STREAM, position))
        sample = self.dataset[index]
        image, valid_hw, labels = self.augmentation(sample, rng)
        return TrainingSample(image, valid_hw, labels, sample.name, index)


def collate(samples: Sequence[TrainingSample]) -> Batch:
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
    processes; process ``p`` of ``P`` takes the ``p``-th of ``P`` equal parts. Iterating again
    starts again at ``start_position``.
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
        drop_last: bool = True,
    ) -> None:
        _check_seed(seed)
        if length < 1:
            raise ArgumentError(f"length: expected at least one image, got {length}.")
        if batch_size < 1 or batch_size % num_processes:
            raise ArgumentError(
                f"batch_size: expected a multiple of num_processes={num_processes}, got "
                f"{batch_size}. It counts the samples of all processes."
            )
        if drop_last and length < batch_size:
            raise ArgumentError(
                f"batch_size: expected at most the {length} images of the data set, got "
                f"{batch_size}. Use smaller batches, or drop_last=False."
            )
        self.length = length
        self.seed = seed
        self.batch_size = batch_size
        self.start_position = start_position
        self.process_index = process_index
        self.num_processes = num_processes
        self.epoch_length = length - length % batch_size if drop_last else length

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
                    order = self.order(epoch)
                keys.append((current, int(order[current % self.epoch_length])))
            yield keys
            position += self.batch_size

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The images' indices in the order of one epoch, int64 ``[length]``."""
        rng = np.random.default_rng((self.seed, _ORDER_STREAM, epoch))
        return rng.permutation(self.length)


def make_loader(
    samples: TrainingSamples,
    sampler: EpochSampler,
    *,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Load batches in worker processes that live as long as the iterator.

    An error of the data set is raised as itself, not as a worker's traceback.
    """
    workers = default_num_workers() if num_workers is None else num_workers
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsItems(samples),
        batch_sampler=sampler,
        collate_fn=_collate_or_error,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers > 0 else None,
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


def default_num_workers() -> int:
    """One worker fewer than the CPUs this process may use, at least 1 and at most 8."""
    return min(max(usable_cpus() - 1, 1), 8)


class _ErrorsAsItems(Dataset[Any]):
    """Passes deliberate errors on as values: raised in a worker, they would arrive as text."""

    def __init__(self, samples: TrainingSamples) -> None:
        self.samples = samples

    def __getitem__(self, key: Key) -> TrainingSample | ZssegError:
        try:
            return self.samples[key]
        except ZssegError as error:
            return error


def _collate_or_error(items: Sequence[TrainingSample | ZssegError]) -> Batch | ZssegError:
    errors = [item for item in items if isinstance(item, ZssegError)]
    return errors[0] if errors else collate([i for i in items if isinstance(i, TrainingSample)])


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ArgumentError(f"seed: expected 0 or more, got {seed}.")
