"""Images of one size with their labels, as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Augmented images of one size with their labels.

    Attributes:
        images: RGB, uint8 ``[B, 3, H, W]``; everything beyond ``valid_hw`` is padding.
        valid_hw: Rows and columns of each image that are not padding, int64 ``[B, 2]``.
        labels: Class indices of the data set, all classes, int64 ``[B, H, W]``; the data set's
            ``ignore_label`` where nothing is annotated and in the padding.
        names: Names of the images, for messages.
    """

    images: Tensor
    valid_hw: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; copies do not wait for pinned memory."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            valid_hw=self.valid_hw.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            names=self.names,
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; a torch ``DataLoader`` calls this by name."""
        return Batch(
            images=self.images.pin_memory(),
            valid_hw=self.valid_hw.pin_memory(),
            labels=self.labels.pin_memory(),
            names=self.names,
        )


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
