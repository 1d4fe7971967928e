"""The operations around the networks, native on the CPU and on CUDA.

Arrays are NumPy arrays, or anything with the buffer protocol, ``__dlpack__`` or
``__cuda_array_interface__``. They must be C-contiguous, aligned (at an address that is a multiple
of their elements' size) and of the stated dtype: nothing is copied or converted silently. All
arrays of a call are on one device, and so is the result: a NumPy array on the CPU and a
:class:`DeviceArray` on CUDA, unless ``out`` is given. bfloat16, which NumPy does not have, is taken
from other libraries' arrays (torch's, by DLPack) and from a :class:`DeviceArray`.

An array that is written (``out``, ``picture``, ``finite``, ``workspace``) shares no memory with
another argument: an overlap is an ArgumentError. Where an output may be an input, that operation
says so; then it is the whole of it.

On CUDA a call returns before the work has run: it is enqueued on ``stream`` (a ``cudaStream_t`` as
an integer; 0 is the legacy default stream), and the inputs must stay alive until then.
:mod:`zsseg_rt.ops.reference` defines every result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from zsseg_rt import _C
from zsseg_rt._C import (
    DEPTH_WORKSPACE_BYTES,
    DeviceArray,
    Event,
    Stream,
    available_cpu_isas,
    cpu_isa,
    cuda_device_count,
    cuda_device_properties,
    cuda_runtime_version,
    get_num_threads,
    set_cpu_isa,
    set_num_threads,
)
from zsseg_rt.common.arrays import Array
from zsseg_rt.common.process import threads_in_quota
from zsseg_rt.ops.core import native
from zsseg_rt.ops.labels import (
    crop_regions,
    label_regions,
    mask_boxes,
    merge_windows,
    upsample_argmax,
    upsample_argmax_overlay,
    warp_blend,
)
from zsseg_rt.ops.similarity import (
    patch_text_similarity,
    relationship_descriptor,
    relationship_descriptor_text,
)

__all__ = [
    "DEPTH_WORKSPACE_BYTES",
    "DeviceArray",
    "Event",
    "Stream",
    "all_finite",
    "available_cpu_isas",
    "count_labels",
    "cpu_isa",
    "crop_regions",
    "cuda_device_count",
    "cuda_device_properties",
    "cuda_runtime_version",
    "get_num_threads",
    "ink",
    "label_regions",
    "mask_boxes",
    "merge_windows",
    "overlay",
    "patch_text_similarity",
    "preprocess",
    "relationship_descriptor",
    "relationship_descriptor_text",
    "set_cpu_isa",
    "set_num_threads",
    "thread_limit",
    "upsample_argmax",
    "upsample_argmax_overlay",
    "warp_blend",
]

if _quota := threads_in_quota():
    set_num_threads(_quota)  # the native core knows the affinity only


@contextmanager
def thread_limit(count: int) -> Iterator[None]:
    """Let the calling thread's operations use at most ``count`` CPU threads inside the block.

    Other threads are not affected, unlike with :func:`set_num_threads`, which sets what every
    thread without a limit of its own uses.

    Args:
        count: Threads, the caller included; 0 changes nothing.

    Raises:
        ArgumentError: ``count`` is negative.
    """
    if count == 0:
        yield
        return
    before = _C.set_thread_limit(count)
    try:
        yield
    finally:
        _C.set_thread_limit(before)


def preprocess(
    frame: Array | tuple[Array, Array],
    *,
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    align: str = "half_pixel",
    whole_hw: tuple[int, int] | None = None,
    origin: tuple[int, int] = (0, 0),
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Turn a camera frame into a network's input: ``(bilinear(frame) / 255 - mean) / std``.

    No antialiasing, edges clamped.

    Args:
        frame: uint8 ``[H, W, 3]``, sides from 1 to 32767; or NV12, as cameras deliver it, in two
            planes with even H and W: brightness uint8 ``[H, W]`` and colour uint8
            ``[H / 2, W / 2, 2]``, U then V of every two by two pixels, limited range. Their rows
            may lie further apart than they are long. It becomes RGB, rounded to bytes, before it
            is resized.
        size_hw: Height and width of the result, from 1 to 32767.
        mean: One per channel in RGB order, in units of 0..1.
        std: Like ``mean``, above 0.
        channel_order: The frame's, ``"rgb"`` or ``"bgr"``; the result is always RGB.
        colour_matrix: ``"bt601"`` or ``"bt709"``, of limited range, ``"bt601-full"`` or
            ``"bt709-full"``: how NV12 becomes RGB.
        align: ``"half_pixel"``: pixel i lies at ``(i + 0.5) * H / h - 0.5`` of the frame.
            ``"corners"``: at ``i * (H - 1) / (h - 1)``, so that outermost pixels meet.
        whole_hw: Size that the frame is resized to, sides from 1 to 32767, of which the result is
            the part from ``origin`` on; None is ``size_hw``: all of it. Where the result reaches
            beyond, it repeats the edge.
        origin: Row and column of the part's first pixel.
        out: Array to write, float32, float16 or bfloat16 ``[3, h, w]``. A new float32 one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the frame's device.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous and aligned, or ``size_hw``
            or ``whole_hw`` is out of range.
        DTypeError: An array has the wrong dtype.
        ArgumentError: ``mean``, ``std``, ``channel_order``, ``colour_matrix`` or ``align`` is not
            as above, or ``origin`` lies outside ``whole_hw``.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    settings = (size_hw, mean, std, channel_order, colour_matrix, align, whole_hw, origin)
    return native(_C.preprocess, frame, *settings, out, stream)


def overlay(
    frame: Array | tuple[Array, Array],
    labels: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Blend each label's colour onto a frame: ``(1 - alpha) * frame + alpha * palette[label]``.

    Rounded to nearest, ties up, after rounding ``alpha`` to a multiple of 2^-16; CPU, CUDA and
    reference agree bit for bit.

    Args:
        frame: uint8 ``[H, W, 3]``, or the two planes of NV12, as for :func:`preprocess`, which
            become RGB, rounded to bytes, before colours are laid over them.
        labels: uint8 or uint16 ``[H, W]``. Pixels that are unknown (255 or 65535) or have no row
            in the palette keep the frame's colour.
        palette: uint8 ``[K, 3]``, in the result's channel order.
        alpha: Weight of the colour, in [0, 1].
        channel_order: The result's, of a frame in planes; another frame keeps its own.
        colour_matrix: As for :func:`preprocess`, of a frame in planes.
        out: Array to write, uint8 ``[H, W, 3]``; may be ``frame``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the frame's device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has the wrong dtype.
        ArgumentError: A setting is outside its range.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    settings = (alpha, channel_order, colour_matrix)
    return native(_C.overlay, frame, labels, palette, *settings, out, stream)


def all_finite(values: Array, *, out: Array | None = None, stream: int = 0) -> Array:
    """Tell whether an array holds neither NaN nor infinity, on the array's own device.

    Args:
        values: float32, float16 or bfloat16, any shape.
        out: Array to write, uint8 ``[1]``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the array's device: 1 if every value is finite, otherwise 0.

    Raises:
        ShapeError: An array is not C-contiguous and aligned, or ``out`` has another shape.
        DTypeError: An array has the wrong dtype.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    return native(_C.all_finite, values, out, stream)


def count_labels(
    labels: Array, num_classes: int, *, out: Array | None = None, stream: int = 0
) -> Array:
    """Count how many pixels carry each label.

    Entry ``c`` is the number of labels equal to ``c``. The last entry counts those of no class:
    unknown (255 or 65535), and labels that are not below ``num_classes``.

    Args:
        labels: uint8 or uint16, any shape.
        num_classes: From 0 to 65534.
        out: Array to write, int64 ``[num_classes + 1]``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the labels' device; its sum is the number of labels.

    Raises:
        ShapeError: An array is not C-contiguous and aligned, or ``out`` has another shape.
        DTypeError: An array has the wrong dtype.
        ArgumentError: ``num_classes`` is out of range.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> count_labels(np.array([[0, 2, 2], [5, 255, 2]], np.uint8), 3)
        array([1, 0, 3, 2])
    """
    return native(_C.count_labels, labels, num_classes, out, stream)


def ink(
    picture: Array,
    weights: Array,
    place: tuple[int, int],
    colours: Sequence[Sequence[int]],
    *,
    stream: int = 0,
) -> Array:
    """Lay colours over a window of a picture: ``(255 - w) / 255 * picture + w / 255 * colour``.

    Rounded to nearest after each colour, in integers; CPU and reference agree bit for bit.

    Args:
        picture: uint8 ``[H, W, 3]``, sides from 1 to 32767, which is written.
        weights: uint8 ``[L, h, w]``, of each colour.
        place: Row and column of the picture where the weights begin. What reaches beyond the
            picture is left out.
        colours: 1 to 4 of three numbers from 0 to 255, in the picture's channel order; each is laid
            over those before it.
        stream: As for other operations; the CPU has none.

    Returns:
        ``picture``.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous, or the picture is
            read-only.
        DTypeError: An array is not of uint8, or a number is not as above.
        ArgumentError: There are not as many colours as weights, or the arrays overlap.
        DeviceError: An array is not on the CPU.
    """
    native(_C.ink, picture, weights, place, colours, stream)
    return picture
