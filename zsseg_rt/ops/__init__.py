"""The operations around the networks, native on the CPU and on CUDA.

Arrays are NumPy arrays, or anything with the buffer protocol, ``__dlpack__`` or
``__cuda_array_interface__``. They must be C-contiguous, aligned (at an address that is a multiple
of their elements' size) and of the stated dtype: nothing is copied or converted silently. All
arrays of a call are on one device, and so is the result: a NumPy array on the CPU and a
:class:`DeviceArray` on CUDA. bfloat16, which NumPy does not have, is taken from other libraries'
arrays (torch's, by DLPack) and from a :class:`DeviceArray`. Where an operation takes small arrays
from host memory as well, it says so.

What every operation does, unless it says otherwise:

- ``out`` is the array to write, and returned; without it, a new one is made.
- An array that is written (``out``, ``picture``, ``finite``, ``workspace``) shares no memory with
  another argument. Where an output may be an input, it is the whole of it.
- On CUDA a call returns before the work has run: it is enqueued on ``stream`` (a ``cudaStream_t``
  as an integer; 0 is the legacy default stream), and the inputs must stay alive until then.
- It raises ShapeError where sizes differ or are out of range, or an array is not C-contiguous and
  aligned; DTypeError for another dtype; ArgumentError for a setting outside its range and for
  arrays that overlap; DeviceError where the arrays are not on one device, or the build has no CUDA.

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
        out: float32, float16 or bfloat16 ``[3, h, w]``; by default float32.
    """
    settings = (size_hw, mean, std, channel_order, colour_matrix, align, whole_hw, origin)
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

    Args:
        cls_embed: Global image embeddings ``[B, D]``.
        text_embeds: Class embeddings ``[C, D]``.
        weight: ``[E, 2 * D]``; the first D columns meet ``cls * text``.
        bias: float32 ``[E]``; not added again if ``text_queries`` is given.
        text_queries: ``relationship_descriptor_text(text_embeds, weight, bias)``, float32
            ``[C, E]``. Computed here if None.
        out: ``[B, C, E]``, float32 or of the embeddings' dtype; by default float32.
        workspace: On CUDA, :data:`DEPTH_WORKSPACE_BYTES` bytes, uint8, at a multiple of 4, that are
            zeros before their first use and that no other call uses at the same time. With it,
            several blocks share the sums where the result alone would not fill the GPU; results
            then differ in rounding. Without it, or with fewer bytes, fewer blocks do.

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
        out: ``[C, E]``, float32 or of the embeddings' dtype; by default float32, which alone can
            be another call's ``text_queries``.
        workspace: As :func:`relationship_descriptor`'s.
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
    or bfloat16.

    Args:
        patch_embeds: float32, float16 or bfloat16 ``[B, N, D]``.
        text_embeds: float32 or the patches' dtype, or any of the three beside float32;
            ``[C, D]``, or ``[B, C, D]`` if they differ by image.
        logit_scale: Finite factor.
        normalize: Divide every row by its L2 norm first (cosine). A row of zeros has similarity 0
            with everything.
        classes_last: Return ``[B, N, C]``, a patch's classes beside each other.
        out: float32 ``[B, C, N]``, or ``[B, N, C]`` with ``classes_last``.
        finite: Array to write, uint8 ``[1]``, as :func:`all_finite` of the result does, in the
            same launch.
        workspace: On CUDA, ``finite`` needs 8 bytes, uint8, that are zeros before their first use
            and that no other call uses at the same time. Every call leaves zeros there. With
            :data:`DEPTH_WORKSPACE_BYTES` bytes, at a multiple of 4, the first 2048 zeros, several
            blocks share the sums where the result alone would not fill the GPU; results then differ
            in rounding.
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


def upsample_argmax(
    logits: Array,
    out_hw: tuple[int, int],
    *,
    activation: str = "none",
    seen: Array | None = None,
    seen_bias: float = 0.0,
    unknown_below: float | None = None,
    with_scores: bool = False,
    label_table: Array | None = None,
    num_classes: Array | None = None,
    align: str = "half_pixel",
    out: Array | tuple[Array, Array | None] | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> tuple[Array, Array | None]:
    """Label every pixel from low-resolution logits, without storing ``[C, H, W]``.

    Bilinear upsampling (edges clamped), activation, minus ``seen_bias`` where
    ``seen``, argmax with ties to the lowest index.

    Args:
        logits: float32, float16 or bfloat16 ``[B, C, h, w]``, widened exactly.
        out_hw: Height and width of the result.
        activation: ``"none"``, ``"sigmoid"`` or ``"softmax"`` (over classes).
        seen: bool ``[C]``; None means that no class is seen.
        seen_bias: Subtracted from the activated value of seen classes.
        unknown_below: Pixels whose score is lower are unknown (255, or 65535 for uint16 labels).
        with_scores: Also return the winner's activated value without the bias.
        label_table: uint8 or uint16 ``[C or more]``: what is stored for a pixel of each class. None
            stores the class.
        num_classes: int32 ``[1]``: how many of the C classes count, the first ones; logits of the
            others are not read. None: all. It is read when the kernel runs, so that one recorded
            call serves vocabularies of several sizes. A number outside 0 to C is an ArgumentError
            on the CPU; on CUDA it counts as the nearest of them.
        align: ``"half_pixel"``: pixel i lies at ``(i + 0.5) * h / H - 0.5`` of the grid.
            ``"corners"``: at ``i * (h - 1) / (H - 1)``, so that the outermost cells lie on the
            outermost pixels.
        out: Labels, or a pair of labels and scores.
        workspace: Memory on the logits' device to write to, aligned to 64 bytes; CUDA needs none.
            None keeps some.

    Returns:
        Labels ``[B, H, W]`` of the table's dtype, without one uint8 up to 254 classes and uint16
        above, and scores float32 ``[B, H, W]`` or None.

    Example:
        >>> logits = np.float32([[[[3, 0]], [[0, 2]], [[9, 9]]]])
        >>> table = np.uint8([4, 4, 7])
        >>> upsample_argmax(logits, (1, 2), label_table=table, num_classes=np.int32([2]))[0]
        array([[[4, 4]]], dtype=uint8)
    """
    settings = (activation, seen, seen_bias, unknown_below, with_scores)
    tables = (label_table, num_classes, align)
    drawn = (None, None, 0.0)
    labels, scores, _ = native(
        _C.upsample_argmax, logits, out_hw, *settings, *tables, *drawn, out, None, workspace, stream
    )
    return labels, scores


def upsample_argmax_overlay(
    logits: Array,
    frame: Array,
    palette: Array,
    *,
    alpha: float = 0.5,
    activation: str = "none",
    seen: Array | None = None,
    seen_bias: float = 0.0,
    unknown_below: float | None = None,
    with_scores: bool = False,
    label_table: Array | None = None,
    num_classes: Array | None = None,
    align: str = "half_pixel",
    out: Array | tuple[Array, Array | None] | None = None,
    picture: Array | None = None,
    stream: int = 0,
) -> tuple[Array, Array | None, Array]:
    """Label every pixel of a frame, and blend the labels' colours onto it, in one pass.

    The results are those of :func:`upsample_argmax`, at the frame's size, and of
    :func:`zsseg_rt.ops.overlay` after it, bit for bit. On CUDA it is one launch.

    Args:
        logits: float32, float16 or bfloat16 ``[1, C, h, w]``.
        frame: uint8 ``[H, W, 3]``: its size is the result's.
        palette: uint8 ``[K, 3]``, a colour for each label that is stored.
        alpha: Weight of the colour, in [0, 1].
        activation: As for :func:`upsample_argmax`, like all up to ``out``.
        picture: uint8 ``[H, W, 3]`` to write; may be ``frame``.

    Returns:
        Labels ``[1, H, W]``, scores float32 ``[1, H, W]`` or None, and ``picture``.
    """
    settings = (activation, seen, seen_bias, unknown_below, with_scores)
    tables = (label_table, num_classes, align)
    drawn = (frame, palette, alpha)
    labels, scores, drawing = native(
        _C.upsample_argmax, logits, None, *settings, *tables, *drawn, out, picture, None, stream
    )
    return labels, scores, drawing


def merge_windows(
    logits: Array,
    shares: Array,
    places: Sequence[tuple[int, int]],
    *,
    add: bool = False,
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Average the logits of overlapping windows on the grid of the whole image.

    Every cell of the result is ``out`` (or 0) plus ``shares`` times each window's logit there, in
    the order of the windows. Cells of a window that lie beyond the grid are left out. Reference,
    CPU and CUDA agree bit for bit.

    Args:
        logits: float32 ``[B, C, h, w]``, at most 16 windows and 65534 classes.
        shares: Weight of a window's logit in each cell, float32 ``[H, W]``; for a mean, one over
            the number of windows that cover it.
        places: Row and column, in cells, of each window's first cell; from 0 to 32766.
        add: Whether ``out`` already holds other windows' part.
        out: float32 ``[1, C, H, W]``.
    """
    return native(_C.merge_windows, logits, shares, places, add, out, stream)


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
        out: float32 ``[B, C, h, w]``; may be ``logits``.
    """
    return native(_C.warp_blend, logits, past, flow, past_weight, out, stream)


def mask_boxes(
    mask_logits: Array,
    canvas_hw: tuple[int, int],
    *,
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Find the bounds and the size of masks, without storing them at the canvas's resolution.

    A canvas pixel is inside a mask if the mask's logit, upsampled (bilinear, half-pixel centres,
    edges clamped), is above zero.

    Args:
        mask_logits: float32 ``[Q, h, w]``, finite, sides up to 4096.
        canvas_hw: Height and width of the canvas, up to 4096.
        out: int32 ``[Q, 5]``.

    Returns:
        int32 ``[Q, 5]``: ``x1, y1, x2, y2``, the first and last column and row with a pixel of the
        mask, and the mask's number of pixels. An empty mask, or one a single pixel wide or high,
        has the box ``0, 0, W, H``.

    Source:
        Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022, official code.
    """
    return native(_C.mask_boxes, mask_logits, canvas_hw, out, stream)


def crop_regions(
    image: Array,
    mask_logits: Array,
    regions: Array,
    boxes: Array,
    *,
    side: int,
    style: str = "cropmask",
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    offset: Sequence[float] = (0.0, 0.0, 0.0),
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Cut regions out of an image and stretch each to a square, for CLIP to classify.

    ``"cropmask"``: the box by RoIAlign (half-pixel aligned, at least one sample per pixel), pixels
    outside the mask zero. ``"crop"``: the box. ``"mask"``: the whole image resized, pixels
    outside the resized mask zero. A visible pixel is ``image * scale + offset``.

    Args:
        image: float32 ``[3, H, W]``, sides up to 4096; its size is the masks' canvas.
        mask_logits: float32 ``[Q, h, w]``, finite; see :func:`mask_boxes`.
        regions: Which masks, int32 ``[R]``, up to 64. It and ``boxes`` are both in host memory,
            also of an image on the GPU, or both on the image's GPU, where neither is checked: what
            lies outside is moved inside.
        boxes: ``x1, y1, x2, y2`` of each region, int32 ``[R, 4]`` in host memory, within the image;
            or what :func:`mask_boxes` returned, int32 ``[Q, 5]``, of every mask.
        side: Side of the crops, from 1 to 1024.
        style: ``"cropmask"``, ``"mask"`` or ``"crop"``.
        scale: One per plane; with ``offset`` it turns one normalisation into another.
        offset: One per plane.
        out: float32 ``[R, 3, side, side]``.

    Source:
        Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022; He et al., "Mask
        R-CNN", ICCV 2017, for RoIAlign.
    """
    return native(
        _C.crop_regions, image, mask_logits, regions, boxes, side, style, scale, offset, out, stream
    )


def label_regions(
    mask_logits: Array,
    class_scores: Array,
    *,
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    bias: Array | None = None,
    unknown_below: float | None = None,
    with_scores: bool = False,
    out: Array | tuple[Array, Array | None] | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> tuple[Array, Array | None]:
    """Label every pixel from soft masks that vote for classes, without storing ``[C, H, W]``.

    A class's score map is the sum over the masks of ``class_scores * sigmoid(mask)``, the mask
    logits upsampled to the canvas before the sigmoid; the map is then resized to the result
    (bilinear, half-pixel centres, edges clamped, both times). The label is the argmax of the score
    minus the bias, ties to the lowest index.

    Args:
        mask_logits: float32 ``[Q, h, w]``, up to 256 masks.
        class_scores: How much each mask counts for each class, float32 ``[C, Q]``.
        canvas_hw: Height and width at which masks become soft.
        out_hw: Height and width of the result.
        bias: Subtracted from each class's score before the argmax, float32 ``[C]``; None for 0.
        unknown_below: Pixels whose score is lower are unknown (255, or 65535 for uint16 labels).
        with_scores: Also return the winner's score without the bias, at most 1.
        out: Labels, or a pair of labels and scores.
        workspace: Memory on the masks' device to write to, aligned to 64 bytes; on CUDA at least
            ``(4 * Q + 16) * C`` bytes with ``Q`` and ``C`` rounded up to multiples of 16 and 64.
            None takes and frees some.

    Returns:
        Labels ``[H, W]``, uint8 up to 254 classes and uint16 above, and scores float32 ``[H, W]``
        or None. A pixel where every class is NaN is unknown, its score 0.

    Source:
        Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022; Cheng et al.,
        "Per-Pixel Classification is Not All You Need for Semantic Segmentation", NeurIPS 2021.
    """
    labels, scores = native(
        _C.label_regions,
        mask_logits,
        class_scores,
        canvas_hw,
        out_hw,
        bias,
        unknown_below,
        with_scores,
        out,
        workspace,
        stream,
    )
    return labels, scores


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
        out: uint8 ``[H, W, 3]``; may be ``frame``.
    """
    settings = (alpha, channel_order, colour_matrix)
    return native(_C.overlay, frame, labels, palette, *settings, out, stream)


def all_finite(values: Array, *, out: Array | None = None, stream: int = 0) -> Array:
    """Tell whether an array holds neither NaN nor infinity, on the array's own device.

    Args:
        values: float32, float16 or bfloat16, any shape.
        out: uint8 ``[1]``.

    Returns:
        ``out``, on the array's device: 1 if every value is finite, otherwise 0.
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
        out: int64 ``[num_classes + 1]``.

    Returns:
        ``out``, on the labels' device; its sum is the number of labels.

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

    Rounded to nearest after each colour, in integers; CPU and reference agree bit for bit. Returns
    ``picture``. On the CPU alone: arrays on a GPU are a DeviceError. A read-only one is refused.

    Args:
        picture: uint8 ``[H, W, 3]``, sides from 1 to 32767, which is written.
        weights: uint8 ``[L, h, w]``, of each colour.
        place: Row and column of the picture where the weights begin. What reaches beyond the
            picture is left out.
        colours: 1 to 4 of three numbers from 0 to 255, in the picture's channel order; each is laid
            over those before it.
        stream: As for other operations; the CPU has none.
    """
    native(_C.ink, picture, weights, place, colours, stream)
    return picture
