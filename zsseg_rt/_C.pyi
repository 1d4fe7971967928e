# ruff: noqa: N999 - the extension's fixed name
"""The native extension. Use :mod:`zsseg_rt.ops`; arguments are described there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array

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
        """Allocate uninitialised memory."""
    @staticmethod
    def from_numpy(array: Array, device: int = 0, stream: int = 0) -> DeviceArray:
        """Copy an array to a device. Pageable memory may be reused when this returns."""
    def copy_from(self, array: Array, stream: int = 0) -> None:
        """Overwrite the contents with an array of this shape and dtype, on the CPU or on CUDA."""
    def copy_to(self, out: Array, stream: int = 0) -> None:
        """Copy the contents to a CPU array of this shape and dtype, and wait for them."""
    def numpy(self, stream: int = 0) -> npt.NDArray[Any]:
        """Copy the contents to a new NumPy array, and wait until they are there."""
    def view(self, shape: Sequence[int]) -> DeviceArray:
        """Return the first elements of the same memory as another shape."""
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
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
    """A CUDA stream that does not synchronise with the default stream."""

    def __init__(self, device: int = 0) -> None: ...
    @property
    def handle(self) -> int: ...
    @property
    def device(self) -> int: ...
    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""

class Event:
    """A point in a stream."""

    def __init__(self, device: int = 0) -> None: ...
    def record(self, stream: int) -> None:
        """Mark the point the stream has been filled to."""
    def wait(self, stream: int) -> None:
        """Make what is enqueued on the stream from now on wait for this point."""
    def synchronize(self) -> None:
        """Make the caller wait for this point."""
    def elapsed_ms(self, later: Event) -> float:
        """Milliseconds from this point to a later one; both must have been reached."""

def cuda_device_count() -> int: ...
def cuda_device_properties(device: int = 0) -> dict[str, Any]: ...
def cuda_set_device(device: int) -> int:
    """Make a GPU the calling thread's current one; return the previous one's index."""

def cuda_runtime_version() -> str | None: ...
def cpu_isa() -> str: ...
def available_cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def set_thread_limit(count: int) -> int:
    """Limit the calling thread's loops, 0 for no limit; return the limit before."""

def preprocess(
    frame: Array,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str,
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
    stream: int,
) -> Array: ...
def relationship_descriptor_text(
    text_embeds: Array, weight: Array, bias: Array, out: Array | None, stream: int
) -> Array: ...
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
    out_hw: tuple[int, int],
    activation: str,
    seen: Array | None,
    seen_bias: float,
    unknown_below: float | None,
    with_scores: bool,
    out: Any,
    workspace: Array | None,
    stream: int,
) -> tuple[Array, Array | None]: ...
def upsample_argmax_device_bytes(num_values: int, num_classes: int) -> int: ...
def overlay(
    frame: Array,
    labels: Array,
    palette: Array,
    alpha: float,
    out: Array | None,
    stream: int,
) -> Array: ...
def all_finite(values: Array, out: Array | None, stream: int) -> Array: ...
def count_labels(labels: Array, num_classes: int, out: Array | None, stream: int) -> Array: ...
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
    stream: int,
) -> tuple[Array, Array | None]: ...
