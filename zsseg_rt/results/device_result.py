"""Labels of a frame that stay on the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from zsseg_rt.ops import DeviceArray
from zsseg_rt.results.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class DeviceSegmentation:
    """Labels of one frame in the memory of a GPU; made by :meth:`Engine.segment_device`.

    The arrays are the result's own, and whole: any stream may read them at once, through DLPack or
    ``__cuda_array_interface__``.

    Attributes:
        labels: uint8 [H, W] indices into ``names``, 255 unknown; uint16 and 65535 above 254
            classes. On the engine's GPU.
        names: Class names in the caller's order.
        vocabulary_version: Version of the vocabulary that made the labels.
        scores: float32 [H, W] on the engine's GPU, the winning class's activated value, or None.
        picture: uint8 [H, W, 3] on the engine's GPU, the frame's overlay, or None.
        times: Milliseconds per stage, ``"total"`` included; see ``EngineConfig(with_times=...)``.
        channel_order: Of the engine's frames and of ``picture``, ``"rgb"`` or ``"bgr"``.
        candidates: As in :class:`Segmentation`.
    """

    labels: DeviceArray
    names: tuple[str, ...]
    vocabulary_version: int
    scores: DeviceArray | None = None
    picture: DeviceArray | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    channel_order: str = "rgb"
    candidates: tuple[str, ...] | None = None

    @property
    def device(self) -> str:
        """The GPU that holds the arrays, as ``"cuda:N"``."""
        return self.labels.device

    @property
    def unknown(self) -> int:
        """The label of a pixel that belongs to no class."""
        return int(np.iinfo(self.labels.dtype).max)

    def to_host(self) -> Segmentation:
        """Copy the labels, and scores if there are any, to host memory.

        Raises:
            CudaError: The copy failed.
        """
        return Segmentation(
            labels=self.labels.numpy(),
            names=self.names,
            vocabulary_version=self.vocabulary_version,
            scores=None if self.scores is None else self.scores.numpy(),
            times=self.times,
            channel_order=self.channel_order,
        )

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return (
            f"DeviceSegmentation({width}x{height} {self.labels.dtype} on {self.device}, "
            f"{len(self.names)} classes, vocabulary_version={self.vocabulary_version})"
        )
