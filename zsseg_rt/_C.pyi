# ruff: noqa: N999 - the extension's fixed name
"""The native extension. Use :mod:`zsseg_rt.ops`; arguments are described there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array

built_with_cuda: bool

class DeviceArray:
    """An array in CUDA memory: owns it, or shares it with the array it is a view of.

    Memory is freed on the stream that last used it; a stream that is not a :class:`Stream` must
    outlive the array. Copies and views need no synchronisation with work on other streams of which
    the array knows: it remembers the last.
    """

    @staticmethod
    def empty(
        shape: Sequence[int], dtype: npt.DTypeLike, device: int = 0, stream: int = 0
    ) -> DeviceArray:
        """Allocate uninitialised memory; ``"bfloat16"`` is a dtype too."""
    @staticmethod
    def from_numpy(array: Array, device: int = 0, stream: int = 0) -> DeviceArray:
        """Copy an array to a device. Pageable memory may be reused when this returns."""
    def copy_from(self, array: Array, stream: int = 0) -> None:
        """Overwrite the contents with an array of this shape and dtype, on the CPU or on CUDA."""
    def copy_to(self, out: Array, stream: int = 0, *, wait: bool = True) -> None:
        """Copy the contents to a CPU array of this shape and dtype.

        Args:
            out: The array to write.
            stream: CUDA stream to enqueue on.
            wait: Return when they are there. False needs pinned memory
                (:attr:`PinnedArray.host`), to be read after a wait for the stream.
        """
    def numpy(self, stream: int = 0) -> npt.NDArray[Any]:
        """Copy the contents to a new NumPy array, and wait until they are there.

        bfloat16, which NumPy does not have, becomes float32 of the same values.
        """
    def view(self, shape: Sequence[int], *, first: int = 0) -> DeviceArray:
        """Return elements of the same memory, from number ``first`` on, as another shape."""
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any:
        """NumPy's dtype; for bfloat16, which NumPy does not have, the text ``"bfloat16"``."""
    @property
    def device(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Stream:
    """A CUDA stream that does not synchronise with the default stream.

    Who waits for it sleeps, or keeps a CPU busy, which sees the end some microseconds sooner; None
    sleeps where the GPU is integrated. Arrays that were used on it before need no order after.
    """

    def __init__(self, device: int = 0, *, sleeps: bool | None = None) -> None: ...
    @property
    def handle(self) -> int: ...
    @property
    def device(self) -> int: ...
    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""

class Event:
    """A point in a stream.

    Recorded in a :class:`Capture`, an event with ``timing`` is reached anew at every launch, and
    can be waited for and measured as one recorded in the stream itself. One without orders streams
    within the capture.
    """

    def __init__(self, device: int = 0, *, timing: bool = True, blocking: bool = False) -> None:
        """Make an event.

        Args:
            device: Index of the GPU.
            timing: The event can measure time.
            blocking: Who waits for it sleeps, which takes no CPU time and a little longer.
        """
    def record(self, stream: int) -> None:
        """Mark the point the stream has been filled to."""
    def wait(self, stream: int) -> None:
        """Make what is enqueued on the stream from now on wait for this point."""
    def synchronize(self) -> None:
        """Make the caller wait for this point."""
    def elapsed_ms(self, later: Event) -> float:
        """Milliseconds from this point to a later one; both must have been reached."""

class Capture:
    """Work of a stream, recorded once as a CUDA graph and launched as often as needed.

    Every launch works on the addresses that were recorded: the arrays must live as long as the
    capture is launched, and their contents may change. Between ``begin`` and ``end`` nothing on the
    stream runs, and the thread may not wait for CUDA, allocate or copy pageable memory; other
    threads may, on other streams. Arrays that are freed on the stream meanwhile go after ``end``.
    """

    def __init__(self, device: int = 0) -> None: ...
    def begin(self, stream: int) -> None:
        """Record what is enqueued on the stream from now on; a previous recording is dropped.

        Raises:
            CaptureError: It is recording already, or the stream cannot be captured.
        """
    def end(self) -> None:
        """Stop recording, in the thread that began it.

        Raises:
            CaptureError: CUDA refused something since ``begin``, or nothing was being recorded. The
                stream is as before, and the capture may begin again.
        """
    def cancel(self) -> None:
        """Stop recording and drop what was recorded; harmless where nothing is."""
    def launch(self, stream: int) -> None:
        """Enqueue the recorded work.

        Raises:
            CaptureError: Nothing has been recorded.
        """
    @property
    def is_recording(self) -> bool: ...
    @property
    def nodes(self) -> int:
        """Number of kernels, copies and events recorded; 0 where nothing is."""

class PinnedArray:
    """Host memory that copies and kernels of a GPU reach while the host does other things.

    Its blocks are kept for the next array of their size. Whatever uses the memory must be over when
    the last of the array, its :attr:`host` and its :meth:`mapped` arrays is collected.
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, device: int = 0) -> None: ...
    @property
    def host(self) -> npt.NDArray[Any]:
        """The memory as a NumPy array, uninitialised at first. It keeps the memory alive."""
    def mapped(self, stream: int = 0) -> DeviceArray:
        """The same memory as an array for kernels on this stream.

        Fast where the GPU is integrated; elsewhere for a few bytes, as each access crosses the bus.
        Not for ``copy_from`` and ``copy_to``.
        """
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...

def cuda_device_count() -> int: ...
def cuda_device_properties(device: int = 0) -> dict[str, Any]: ...
def cuda_set_device(device: int, *, only_active: bool = False) -> int:
    """Make a GPU the calling thread's current one; return the previous one's index.

    With ``only_active``, only where this process has a context on it, and none is made there.
    """

def cuda_runtime_version() -> str | None: ...
def cpu_isa() -> str: ...
def available_cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def set_thread_limit(count: int) -> int:
    """Limit the calling thread's loops, 0 for no limit; return the limit before."""

def preprocess(
    frame: Array | tuple[Array, Array],
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str,
    colour_matrix: str,
    align: str,
    whole_hw: tuple[int, int] | None,
    origin: tuple[int, int],
    out: Array | None,
    stream: int,
) -> Array: ...
def relationship_descriptor(
    cls_embed: Array,
    text_embeds: Array,
    weight: Array,
    bias: Array,
    text_queries: Array | None,
    out: Array | None,
    workspace: Array | None,
    stream: int,
) -> Array: ...
def relationship_descriptor_text(
    text_embeds: Array,
    weight: Array,
    bias: Array,
    out: Array | None,
    workspace: Array | None,
    stream: int,
) -> Array: ...

DEPTH_WORKSPACE_BYTES: int

def patch_text_similarity(
    patch_embeds: Array,
    text_embeds: Array,
    logit_scale: float,
    normalize: bool,
    classes_last: bool,
    out: Array | None,
    finite: Array | None,
    workspace: Array | None,
    stream: int,
) -> Array: ...
def upsample_argmax(
    logits: Array,
    out_hw: tuple[int, int] | None,
    activation: str,
    seen: Array | None,
    seen_bias: float,
    unknown_below: float | None,
    with_scores: bool,
    label_table: Array | None,
    num_classes: Array | None,
    align: str,
    frame: Array | None,
    palette: Array | None,
    alpha: float,
    out: Any,
    picture: Array | None,
    workspace: Array | None,
    stream: int,
) -> tuple[Array, Array | None, Array | None]: ...
def overlay(
    frame: Array | tuple[Array, Array],
    labels: Array,
    palette: Array,
    alpha: float,
    channel_order: str,
    colour_matrix: str,
    out: Array | None,
    stream: int,
) -> Array: ...
def ink(
    picture: Array,
    weights: Array,
    place: tuple[int, int],
    colours: Sequence[Sequence[int]],
    stream: int,
) -> None: ...
def all_finite(values: Array, out: Array | None, stream: int) -> Array: ...
def count_labels(labels: Array, num_classes: int, out: Array | None, stream: int) -> Array: ...
def merge_windows(
    logits: Array,
    shares: Array,
    places: Sequence[tuple[int, int]],
    add: bool,
    out: Array | None,
    stream: int,
) -> Array: ...
def move_labels(
    labels: Array,
    flow: Array,
    refined: Array | None,
    start: Array,
    now: Array,
    limits: tuple[int, int, int],
    out: Array,
    out_flow: Array,
) -> None: ...
def warp_blend(
    logits: Array,
    past: Array,
    flow: Array,
    past_weight: Array,
    out: Array | None,
    stream: int,
) -> Array: ...
def mask_boxes(
    mask_logits: Array, canvas_hw: tuple[int, int], out: Array | None, stream: int
) -> Array: ...
def crop_regions(
    image: Array,
    mask_logits: Array,
    regions: Array,
    boxes: Array,
    side: int,
    style: str,
    scale: Sequence[float],
    offset: Sequence[float],
    out: Array | None,
    stream: int,
) -> Array: ...
def label_regions(
    mask_logits: Array,
    class_scores: Array,
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    bias: Array | None,
    unknown_below: float | None,
    with_scores: bool,
    out: Any,
    workspace: Array | None,
    stream: int,
) -> tuple[Array, Array | None]: ...
def label_regions_device_bytes(num_classes: int, num_regions: int) -> int: ...
