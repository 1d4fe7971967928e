"""The operations between a network's logits, its masks and their labels."""

from __future__ import annotations

from collections.abc import Sequence

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.core import native


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
            call serves vocabularies of several sizes. On CUDA a number outside 0 to C counts as
            the nearest of them.
        align: ``"half_pixel"``: pixel i lies at ``(i + 0.5) * h / H - 0.5`` of the grid.
            ``"corners"``: at ``i * (h - 1) / (H - 1)``, so that the outermost cells lie on the
            outermost pixels.
        out: Labels to write, or a pair of labels and scores. New ones if None.
        workspace: Memory on the logits' device to write to, aligned to 64 bytes; CUDA needs none.
            None keeps some.
        stream: CUDA stream to enqueue on.

    Returns:
        Labels ``[B, H, W]`` of the table's dtype, without one uint8 up to 254 classes and uint16
        above, and scores float32 ``[B, H, W]`` or None.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: A setting is outside its range; on the CPU also ``num_classes``.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

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
        seen: bool ``[C]``, the seen classes.
        seen_bias: Subtracted from the activated value of seen classes.
        unknown_below: Pixels whose score is lower are unknown.
        with_scores: Also return the winner's activated value.
        label_table: uint8 or uint16 ``[C or more]``, what is stored for a pixel of each class.
        num_classes: int32 ``[1]``: how many of the C classes count, the first ones.
        align: ``"half_pixel"`` or ``"corners"``.
        out: Labels to write, or a pair of labels and scores.
        picture: Array to write, uint8 ``[H, W, 3]``; may be ``frame``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        Labels ``[1, H, W]``, scores float32 ``[1, H, W]`` or None, and ``picture``.

    Raises:
        ShapeError: There is more than one image, sizes differ or are out of range, or an array is
            not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: A setting is outside its range; on the CPU also ``num_classes``.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> frame, palette = np.zeros((1, 2, 3), np.uint8), np.uint8([[200, 0, 0], [0, 100, 0]])
        >>> logits = np.float32([[[[3, 0]], [[0, 2]]]])
        >>> upsample_argmax_overlay(logits, frame, palette)[2]
        array([[[100,   0,   0],
                [  0,  50,   0]]], dtype=uint8)
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
        out: Array to write, float32 ``[1, C, H, W]``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the logits' device.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array is not float32.
        ArgumentError: ``places`` is not as above, or ``add`` without ``out``.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> windows = np.float32([[[[2, 4]]], [[[8, 6]]]])  # two of them, which share a cell
        >>> merge_windows(windows, np.float32([[1, 0.5, 1]]), [(0, 0), (0, 1)])
        array([[[[2., 6., 6.]]]], dtype=float32)
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
        out: Array to write, int32 ``[Q, 5]``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        int32 ``[Q, 5]``: ``x1, y1, x2, y2``, the first and last column and row with a pixel of the
        mask, and the mask's number of pixels. An empty mask, or one a single pixel wide or high,
        has the box ``0, 0, W, H``.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous and aligned.
        DTypeError: An array has the wrong dtype.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

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
        regions: Which masks, int32 ``[R]``, up to 64. In host memory, or with ``boxes`` on the
            GPU, where neither is checked: what lies outside is moved inside.
        boxes: ``x1, y1, x2, y2`` of each region, int32 ``[R, 4]`` in host memory, within the image;
            or what :func:`mask_boxes` returned, int32 ``[Q, 5]``, of every mask.
        side: Side of the crops, from 1 to 1024.
        style: ``"cropmask"``, ``"mask"`` or ``"crop"``.
        scale: One per plane; with ``offset`` it turns one normalisation into another.
        offset: One per plane.
        out: Array to write, float32 ``[R, 3, side, side]``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the image's device.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous and aligned.
        DTypeError: An array has the wrong dtype.
        ArgumentError: A region, a box or a setting is outside its range.
        DeviceError: Image and masks are not on one device, regions and boxes are neither both in
            host memory nor both on that device, or the build has no CUDA.

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
        out: Labels to write, or a pair of labels and scores. New ones if None.
        workspace: Memory on the masks' device to write to, aligned to 64 bytes; on CUDA at least
            ``(4 * Q + 16) * C`` bytes with ``Q`` and ``C`` rounded up to multiples of 16 and 64.
            None takes and frees some.
        stream: CUDA stream to enqueue on.

    Returns:
        Labels ``[H, W]``, uint8 up to 254 classes and uint16 above, and scores float32 ``[H, W]``
        or None. A pixel where every class is NaN is unknown, its score 0.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array is not float32.
        ArgumentError: ``unknown_below`` is NaN, or ``out`` has scores that are not asked for.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

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
