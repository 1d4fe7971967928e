"""Operations between a network's logits and their labels, cell by cell of the grid."""

from __future__ import annotations

from collections.abc import Sequence

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.core import native


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
