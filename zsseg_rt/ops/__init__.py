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
from zsseg_rt.arrays import Array
from zsseg_rt.cpus import threads_in_quota
from zsseg_rt.ops.labels import upsample_argmax, upsample_argmax_overlay
from zsseg_rt.ops.native import native
from zsseg_rt.ops.regions import crop_regions, label_regions, mask_boxes

__all__ = [
    "DEPTH_WORKSPACE_BYTES",
    "DeviceArray",
    "Event",
    "Stream",
    "all_finite",
    "available_cpu_isas",
    "blend_cosines",
    "count_labels",
    "cpu_isa",
    "crop_regions",
    "cuda_device_count",
    "cuda_device_properties",
    "cuda_runtime_version",
    "get_num_threads",
    "label_regions",
    "mask_boxes",
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
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Turn a camera frame into a network's input: ``(bilinear(frame) / 255 - mean) / std``.

    Half-pixel centres, no antialiasing, edges clamped.

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
        colour_matrix: ``"bt601"`` or ``"bt709"``: how NV12 becomes RGB.
        out: Array to write, float32, float16 or bfloat16 ``[3, h, w]``. A new float32 one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the frame's device.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous and aligned, or ``size_hw``
            is out of range.
        DTypeError: An array has the wrong dtype.
        ArgumentError: ``mean``, ``std``, ``channel_order`` or ``colour_matrix`` is not as above.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    settings = (size_hw, mean, std, channel_order, colour_matrix)
    return native(_C.preprocess, frame, *settings, out, stream)


def relationship_descriptor(
    cls_embed: Array,
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    text_queries: Array | None = None,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Describe how an image relates to every class: ``[cls * text, text] Wᵀ + b``.

    The concatenation is never stored. Its text half does not depend on the image:
    :func:`relationship_descriptor_text` computes it once for many images.

    ``cls_embed``, ``text_embeds`` and ``weight`` are all float32, all float16 or all bfloat16; sums
    are float32. On CUDA, float16 and bfloat16 meet in the tensor cores, which get ``cls * text``
    rounded to that dtype. The same call gives the same bits every time.

    NumPy has no bfloat16: such arrays come through DLPack, as torch tensors do, on every device.

    Args:
        cls_embed: Global image embeddings ``[B, D]``.
        text_embeds: Class embeddings ``[C, D]``.
        weight: ``[E, 2 * D]``; the first D columns meet ``cls * text``.
        bias: float32 ``[E]``; not added again if ``text_queries`` is given.
        text_queries: ``relationship_descriptor_text(text_embeds, weight, bias)``, float32
            ``[C, E]``. Computed here if None.
        out: Array to write, ``[B, C, E]``, float32 or of the embeddings' dtype. A new float32 one
            if None.
        workspace: On CUDA, :data:`DEPTH_WORKSPACE_BYTES` bytes, uint8, at a multiple of 4, that are
            zeros before their first use and that no other call uses at the same time. With it,
            several blocks share the sums where the result alone would not fill the GPU; results
            then differ in rounding. Without it, or with fewer bytes, fewer blocks do.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``workspace`` is not at a multiple of 4.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023, Relationship Descriptor.
    """
    halves = (cls_embed, text_embeds, weight, bias, text_queries)
    return native(_C.relationship_descriptor, *halves, out, workspace, stream)


def relationship_descriptor_text(
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Compute the half of :func:`relationship_descriptor` that does not depend on the image.

    ``text W[:, D:]ᵀ + b``.

    Args:
        text_embeds: Class embeddings ``[C, D]``, float32, float16 or bfloat16.
        weight: ``[E, 2 * D]``, of the same dtype.
        bias: float32 ``[E]``.
        out: Array to write, ``[C, E]``, float32 or of the embeddings' dtype. A new float32 one if
            None. Only float32 can be another call's ``text_queries``.
        workspace: As :func:`relationship_descriptor`'s.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``workspace`` is not at a multiple of 4.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    return native(
        _C.relationship_descriptor_text, text_embeds, weight, bias, out, workspace, stream
    )


def patch_text_similarity(
    patch_embeds: Array,
    text_embeds: Array,
    *,
    logit_scale: float = 1.0,
    normalize: bool = True,
    classes_last: bool = False,
    out: Array | None = None,
    finite: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Compare every patch with every class: ``logit_scale * <patch, text>``, class-major.

    Accumulated in float32 for every input dtype; on CUDA, two float16 or two bfloat16 inputs meet
    in the tensor cores (bfloat16 from sm_80 on). The same call gives the same bits every time.

    Each input may be float32; beside it, or beside one of its own dtype, the other may be float16
    or bfloat16. NumPy has no bfloat16: such arrays come through DLPack, as torch tensors do, on
    every device.

    Args:
        patch_embeds: float32, float16 or bfloat16 ``[B, N, D]``.
        text_embeds: float32 or the patches' dtype, or any of the three beside float32;
            ``[C, D]``, or ``[B, C, D]`` if they differ by image.
        logit_scale: Finite factor.
        normalize: Divide every row by its L2 norm first (cosine). A row of zeros has similarity 0
            with everything.
        classes_last: Return ``[B, N, C]``, a patch's classes beside each other.
        out: Array to write, float32 ``[B, C, N]``, or ``[B, N, C]`` with ``classes_last``. A new
            one if None.
        finite: Array to write, uint8 ``[1]``, as :func:`all_finite` of the result does, in the
            same launch.
        workspace: On CUDA, ``finite`` needs 8 bytes, uint8, that are zeros before their first use
            and that no other call uses at the same time. Every call leaves zeros there. With
            :data:`DEPTH_WORKSPACE_BYTES` bytes, at a multiple of 4, the first 2048 zeros, several
            blocks share the sums where the result alone would not fill the GPU; results then differ
            in rounding.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``logit_scale`` is not finite, or ``workspace`` is missing or too small.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    settings = (logit_scale, normalize, classes_last)
    return native(
        _C.patch_text_similarity,
        patch_embeds,
        text_embeds,
        *settings,
        out,
        finite,
        workspace,
        stream,
    )


def warp_blend(
    logits: Array,
    past: Array,
    flow: Array,
    past_weight: Array,
    *,
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Move past logits along a flow field and blend them with new ones.

    Each cell of the result is ``(1 - v) * logits + v * past(cell + flow)``, where ``v`` is its
    ``past_weight`` and ``past`` is sampled bilinearly between the centres of cells. In the strip
    between the outermost centres and the edge of the grid, half a cell away, the edge is clamped. A
    cell whose origin lies beyond that edge has no past: there the result is ``logits``, bit for
    bit, as it is where the weight is not above 0. Reference, CPU and CUDA agree bit for bit.

    Args:
        logits: float32 ``[B, C, h, w]``, from 1 to 65534 classes, sides from 1 to 32767.
        past: float32 ``[B, C, h, w]``; read only where it counts.
        flow: float32 ``[B, h, w, 2]``: x, then y, from a cell to where it was, in cells. NaN leads
            out of the grid.
        past_weight: Weight of the past, float32 ``[B, h, w]``. Above 1 counts as 1, NaN as 0.
        out: Array to write, float32 ``[B, C, h, w]``; may be ``logits``.
            A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array is not float32.
        ArgumentError: ``out`` overlaps another array.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> new, past = np.float32([[[[0, 0, 0]]]]), np.float32([[[[8, 4, 2]]]])
        >>> flow = np.float32([[[[-1, 0], [-1, 0], [-0.5, 0]]]])  # from the left
        >>> warp_blend(new, past, flow, np.float32([[[0.5, 0.5, 0.5]]]))
        array([[[[0. , 4. , 1.5]]]], dtype=float32)
    """
    return native(_C.warp_blend, logits, past, flow, past_weight, out, stream)


def blend_cosines(
    mask_logits: Array,
    cosines: Array,
    weights: Array,
    shares: Array,
    *,
    activation: str = "sigmoid",
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Blend what a decoder says of each class with the cosine of patch and name.

    At each cell, ``p`` is the activated mask logit and ``c`` the class's part of a softmax over the
    cosines of all phrases; the result is the log-odds of ``p ** (1 - w) * c ** w``, so it can be
    upsampled like mask logits, and a sigmoid makes a probability of it. A class with several
    phrases has no advantage in the softmax if each counts its part of the class.

    Probabilities above 1 - 1e-6 count as that. Absent classes (mask logits of at most -1e20) stay
    so and have no part in the softmax; NaN and infinite mask logits stay what they are.

    Args:
        mask_logits: float32 ``[B, C, h, w]``, from 1 to 65534 classes, sides from 1 to 32767.
        cosines: Scaled cosines, float32 ``[B, C, h, w]``.
        weights: ``w`` of each class, float32 ``[C]``, in [0, 1].
        shares: How much of its class each phrase is, float32 ``[C]``; rows of 0 are no phrases and
            have no part in any softmax.
        activation: Of the mask logits, ``"sigmoid"`` or ``"softmax"`` over classes.
        out: Array to write, float32 ``[B, C, h, w]``; may be ``mask_logits`` or ``cosines``. A new
            one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array is not float32.
        ArgumentError: The activation is unknown.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> logits, cosines = np.zeros((2, 1, 2, 1, 1), np.float32)
        >>> cosines[0, 0] = np.log(3)
        >>> halves, ones = np.float32([0.5, 0.5]), np.float32([1, 1])
        >>> odds = blend_cosines(logits, cosines, halves, ones)
        >>> 1 / (1 + np.exp(-odds.ravel()))  # sqrt(0.5 * 0.75), sqrt(0.5 * 0.25)
        array([0.6123724 , 0.35355338], dtype=float32)
    """
    arrays = (mask_logits, cosines, weights, shares)
    return native(_C.blend_cosines, *arrays, activation, out, stream)


def overlay(
    frame: Array,
    labels: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Blend each label's colour onto a frame: ``(1 - alpha) * frame + alpha * palette[label]``.

    Rounded to nearest, ties up, after rounding ``alpha`` to a multiple of 2^-16; CPU, CUDA and
    reference agree bit for bit.

    Args:
        frame: uint8 ``[H, W, 3]``.
        labels: uint8 or uint16 ``[H, W]``. Pixels that are unknown (255 or 65535) or have no row
            in the palette keep the frame's colour.
        palette: uint8 ``[K, 3]``, in the frame's channel order.
        alpha: Weight of the colour, in [0, 1].
        out: Array to write, uint8 ``[H, W, 3]``; may be ``frame``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the frame's device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has the wrong dtype.
        ArgumentError: ``alpha`` is outside [0, 1].
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    return native(_C.overlay, frame, labels, palette, alpha, out, stream)


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
