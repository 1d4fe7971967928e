"""Where kernels are timed: their arrays and rivals on the CPU or a GPU, and captures of launches.

Between two events around one call on a GPU lie its launch and the Python before it, which take
longer than most kernels do. So many launches are captured, and their replay is timed. This file
imports no torch where none is installed.
"""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zsseg_rt import ops
from zsseg_rt.errors import ZssegError
from zsseg_rt.ops import reference

LAUNCHES = 100


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


class EventTimer:
    """Marks the begin and end of work on a stream, by CUDA events; times a sampler's calls."""

    def __init__(self, stream: int, device: int = 0) -> None:
        self._stream = stream
        self._begin, self._end = ops.Event(device), ops.Event(device)

    def begin(self) -> None:
        """Mark the begin of the work that is enqueued next."""
        self._begin.record(self._stream)

    def end_ms(self) -> float:
        """Wait for the work and return its milliseconds."""
        self._end.record(self._stream)
        self._end.synchronize()
        return self._begin.elapsed_ms(self._end)


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


def compared(
    bench: CpuBench,
    op: str,
    sizes: str,
    arrays: Sequence[Any],
    out: np.ndarray,
    *,
    tolerance: float = 0.0,
    given: Mapping[str, Any] | None = None,
    flops: int = 0,
    **settings: Any,
) -> Case:
    """A case whose result is compared with the reference's.

    Args:
        bench: Where.
        op: The operation.
        sizes: What the report calls the case.
        arrays: Its first arguments; a tuple is planes, and int32 stays on the host.
        out: An array like the result.
        tolerance: Of the result, relative to the largest value.
        given: Settings that the reference does not have.
        flops: Of its products.
        **settings: The others.
    """
    placed = [
        tuple(map(bench.place, array))
        if isinstance(array, tuple)
        else (array if array.dtype == np.int32 else bench.place(array))
        for array in arrays
    ]
    target = bench.place(out)

    def ours() -> Any:
        more = {**settings, **(given or {})}
        return getattr(ops, op)(*placed, **more, out=target, stream=bench.stream)

    def check() -> None:
        expected = getattr(reference, op)(*arrays, **settings)
        expect_close(bench.fetch(ours()), expected, tolerance)

    planes = [p for a in (*arrays, out) for p in (a if isinstance(a, tuple) else (a,))]
    num_bytes = sum(plane.nbytes for plane in planes)
    return Case(op, sizes, num_bytes, check, {"zsseg_rt": ours}, flops)


def variant(dtype: np.dtype, in_frame: bool) -> str:
    """The difference of a case from one of the same sizes."""
    return (" float16" if dtype == np.float16 else "") + (" in a frame" if in_frame else "")


@functools.cache
def smooth_logits(classes: int, grid: int) -> np.ndarray:
    """Logits as networks produce them: slow variation over the image and noise in every cell."""
    generator = np.random.default_rng(0)
    slow = generator.standard_normal((1, classes, 8, 8), np.float32)
    noise = generator.standard_normal((1, classes, grid, grid), np.float32)
    return 3 * reference.upsample_bilinear(slow, (grid, grid)) + np.float32(0.1) * noise


class CaptureRefusedError(ZssegError):
    """CUDA does not capture these launches, because they wait, or copy from the host."""


def capture_launches(
    torch: Any, calls: Sequence[Callable[[], Any]], *, stream: int, launches: int = LAUNCHES
) -> Callable[[], Any]:
    """Capture calls that take turns, and return what replays them all.

    Args:
        torch: The module, with CUDA.
        calls: The same work on buffers of their own, so that a replay does not find all its data
            in the GPU's cache. They enqueue on ``stream``.
        stream: Handle of the CUDA stream; the replay goes to torch's current one.
        launches: Calls in one replay.

    Raises:
        CaptureRefusedError: CUDA or a call refused; the calls work as before.
    """
    for call in calls:
        call()  # modules and handles that the first call loads
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # memory freed meanwhile would be freed in every replay
    try:
        with torch.cuda.graph(
            captured,
            stream=torch.cuda.ExternalStream(stream),
            capture_error_mode="thread_local",
        ):
            for index in range(launches):
                calls[index % len(calls)]()
    except (RuntimeError, ZssegError) as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise CaptureRefusedError(first) from exc
    finally:
        if collecting:
            gc.enable()
    captured.replay()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = captured.replay
    return replay
