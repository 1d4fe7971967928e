"""Operations on rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.native import native


def add_layer_norm(
    x: Array,
    y: Array,
    scale: Array,
    shift: Array,
    *,
    eps: float | Sequence[float],
    total: Array | None = None,
    total_after: int = 0,
    out: Array | None = None,
    stream: int = 0,
) -> Array:
    """Add two arrays of rows, and normalise the sum's rows once or twice, in one launch.

    ``x + y`` is rounded to its type. From there, for each norm ``l`` a row ``v`` becomes
    ``(v - mean(v)) / sqrt(mean((v - mean(v)) ** 2) + eps[l]) * scale[l] + shift[l]``, in float32;
    the last one is rounded to the type of ``out``.

    Args:
        x: As ``y``; or of wider rows, of which the first D are read.
        y: float32, float16 or bfloat16 ``[N, D]``, D from 1 to 2048.
        scale: float32 ``[L, D]``, L norms, 1 or 2.
        shift: float32 ``[L, D]``.
        eps: What is added to the variance, a number per norm; one norm takes it alone, too.
        total: Array that the sum is written to, as ``y``; not written if None.
        total_after: 1: ``total`` is what the first of two norms gives, rounded, and the second
            begins from there. Without ``total`` it has no meaning.
        out: Array to write, as ``y``. A new one if None.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ or are out of range, or an array is not C-contiguous and aligned.
        DTypeError: An array is of another type.
        ArgumentError: ``eps`` has not a number per norm, ``total_after`` is not below their number,
            or an array that is written overlaps another one.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Example:
        >>> rows, ones = np.float32([[1, 3]]), np.ones((1, 2), np.float32)
        >>> add_layer_norm(rows, ones, ones, 0 * ones, eps=[0.0])
        array([[-1.,  1.]], dtype=float32)
    """
    each = eps if isinstance(eps, Iterable) else [eps]
    return native(_C.add_layer_norm, x, y, scale, shift, each, total, total_after, out, stream)
