"""The operation that labels pixels from logits of classes."""

from __future__ import annotations

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
