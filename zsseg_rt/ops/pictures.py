"""What is made of painted pictures, on their own device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.native import native


def yuv420(
    image: Array,
    *,
    layout: str = "nv12",
    channel_order: str = "rgb",
    colour_matrix: str = "bt601",
    out: tuple[Array, ...] | None = None,
    stream: int = 0,
) -> tuple[Any, ...]:
    """Turn a picture into the planes that encoders take: YUV 4:2:0, with 8 bits.

    A colour is of the mean of its two by two pixels. All is rounded to nearest, ties up, once, in
    integers: CPU, CUDA and reference agree bit for bit. Of a picture in one colour, what
    :func:`overlay` makes of the planes differs by at most 2 in a channel, 1 with a full range.

    Args:
        image: uint8 ``[H, W, 3]``, sides from 1 to 32767.
        layout: ``"nv12"`` or ``"i420"``.
        channel_order: The image's, ``"rgb"`` or ``"bgr"``.
        colour_matrix: As for :func:`preprocess`. ``"bt601"`` is OpenCV's; JPEGs are
            ``"bt601-full"``.
        out: Planes to write, as below; their rows may lie further apart than they are long. New
            ones if None.
        stream: CUDA stream to enqueue on.

    Returns:
        The planes, uint8, on the image's device. H' and W' are H and W rounded up to even: the last
        row and column are repeated. NV12: brightness ``[H', W']`` and colour
        ``[H' / 2, W' / 2, 2]``, U then V. I420: ``[H', W']``, and U and V, each
        ``[H' / 2, W' / 2]``.

    Raises:
        ShapeError: An array has the wrong sizes, or is not contiguous but for rows of ``out``.
        DTypeError: An array is not of uint8.
        ArgumentError: A setting is not as above, or ``out`` has another number of planes.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    return native(_C.yuv420, image, layout, channel_order, colour_matrix, out, stream)  # type: ignore[no-any-return]


def ink(
    picture: Array,
    weights: Array,
    place: tuple[int, int],
    colours: Sequence[Sequence[int]],
    *,
    stream: int = 0,
) -> Array:
    """Lay colours over a window of a picture: ``(255 - w) / 255 * picture + w / 255 * colour``.

    Rounded to nearest after each colour, in integers; CPU, CUDA and reference agree bit for bit.

    Args:
        picture: uint8 ``[H, W, 3]``, sides from 1 to 32767, which is written.
        weights: uint8 ``[L, h, w]``, of each colour.
        place: Row and column of the picture where the weights begin. What reaches beyond the
            picture is left out.
        colours: 1 to 4 of three numbers from 0 to 255, in the picture's channel order; each is laid
            over those before it.
        stream: CUDA stream to enqueue on.

    Returns:
        ``picture``.

    Raises:
        ShapeError: An array has the wrong sizes or is not C-contiguous, or the picture is
            read-only.
        DTypeError: An array is not of uint8, or a number is not as above.
        ArgumentError: There are not as many colours as weights, or the arrays overlap.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    native(_C.ink, picture, weights, place, colours, stream)
    return picture
