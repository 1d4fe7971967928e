"""The operations on proposed regions; public as :mod:`zsseg_rt.ops`'s own."""

from __future__ import annotations

from collections.abc import Sequence

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.core import native


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
