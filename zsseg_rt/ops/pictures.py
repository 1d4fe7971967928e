"""What is written on painted pictures, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.native import native


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
