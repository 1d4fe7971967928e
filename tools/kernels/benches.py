"""Where kernels are timed: their arrays and rivals on the CPU or on a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.kernels.device_timer import EventTimer
from zsseg_rt import ops
from zsseg_rt.ops import reference


class MismatchError(Exception):
    """A kernel's result differs from the reference's."""


@dataclass
class Case:
    """One operation at one size; the first candidate is ours."""

    op: str
    sizes: str
    num_bytes: int
    check: Callable[[], None]
    candidates: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: int = 0  # of its products


class CpuBench:
    """Places arrays on the CPU."""

    name = "cpu"
    sets = 1  # of buffers
    stream = 0
    timer: EventTimer | None = None

    def __init__(self, threads: int) -> None:
        ops.set_num_threads(threads)
        self.torch = installed("torch")
        self.cv2 = installed("cv2")
        if self.torch:
            self.torch.set_num_threads(threads)
        if self.cv2:
            self.cv2.setNumThreads(threads)

    def place(self, array: np.ndarray) -> Any:
        """Return our array."""
        return array

    def tensor(self, array: np.ndarray) -> Any:
        """Return torch's array of the same content."""
        return self.torch.from_numpy(array)

    def zeros(self) -> Any:
        """The memory in which products and votes meet; None on the CPU, which needs none."""
        return None

    def fetch(self, array: Any) -> np.ndarray:
        """Return a NumPy array."""
        return np.asarray(array)


class CudaBench(CpuBench):
    """The same on the first GPU, timed by events on one stream that torch shares."""

    name = "cuda"
    sets = 8

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.cv2 = None
        self._owner = ops.Stream(0)
        self.stream = self._owner.handle
        self.timer = EventTimer(self.stream)
        if self.torch and not self.torch.cuda.is_available():
            self.torch = None
        if self.torch:
            self.torch.cuda.set_stream(self.torch.cuda.ExternalStream(self.stream))

    def place(self, array: np.ndarray) -> Any:
        """Copy to the GPU."""
        return ops.DeviceArray.from_numpy(array, 0, self.stream)

    def tensor(self, array: np.ndarray) -> Any:
        """Copy to the GPU, as a tensor."""
        return self.torch.from_numpy(array).cuda()

    def zeros(self) -> Any:
        """The memory in which products and votes meet, of this case alone."""
        return self.place(np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8))

    def fetch(self, array: Any) -> np.ndarray:
        """Copy from the GPU."""
        return array.numpy(self.stream)


def installed(name: str) -> Any | None:
    """Import an optional rival."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def expect_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raise unless all values agree, relative to the largest."""
    worst = float(np.abs(got.astype(np.float64) - expected).max())
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    if not worst <= limit:
        raise MismatchError(f"differs from the reference by {worst:.3g}, more than {limit:.3g}")


def variant(dtype: np.dtype, in_frame: bool) -> str:
    """What distinguishes a case from one of the same sizes."""
    return (" float16" if dtype == np.float16 else "") + (" in a frame" if in_frame else "")


@functools.cache
def smooth_logits(classes: int, grid: int) -> np.ndarray:
    """Logits as networks produce them: slow variation over the image and noise in every cell."""
    generator = np.random.default_rng(0)
    slow = generator.standard_normal((1, classes, 8, 8), np.float32)
    noise = generator.standard_normal((1, classes, grid, grid), np.float32)
    return 3 * reference.upsample_bilinear(slow, (grid, grid)) + np.float32(0.1) * noise
