"""Images as encoders of video take them: brightness in full, colour for every second pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# ITU-R BT.601, limited range, as OpenCV and FFmpeg take it for RGB: rows for U and V. The first row
# is there because OpenCV has a fast way for three rows, not for two.
_CHROMA = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [-0.148223, -0.290993, 0.439216, 128.0],
        [0.439216, -0.367788, -0.071427, 128.0],
    ]
)

_MOST_SIDE = 16_384  # pixels that H.264 takes


def encodable(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image, or every second, third, ... pixel of it where a side is longer than H.264 takes.

    Shapes:
        image: uint8 [H, W, 3].
    """
    step = -(-max(image.shape[:2]) // _MOST_SIDE)
    return np.ascontiguousarray(image[::step, ::step])


class I420:
    """Converts images of one size, in one thread; several times faster than FFmpeg does.

    Attributes:
        planes: uint8 [H * 3 / 2, W] with the even sides: Y, then U and V at half the height and
            width, of the image converted last.
    """

    def __init__(self, size_hw: tuple[int, int], *, channel_order: str) -> None:
        import cv2

        height, width = size_hw
        self._padding = (0, height % 2, 0, width % 2)  # top, bottom, left, right
        height, width = height + height % 2, width + width % 2
        self.planes = np.empty((height * 3 // 2, width), np.uint8)
        chroma = self.planes[height:].reshape(2, height // 2, width // 2)
        self._chroma = [chroma[0], chroma[1]]
        self._half = np.empty((height // 2, width // 2, 3), np.uint8)
        self._mixed = np.empty_like(self._half)
        is_rgb = channel_order == "rgb"
        self._code = cv2.COLOR_RGB2YUV_I420 if is_rgb else cv2.COLOR_BGR2YUV_I420
        self._matrix = _CHROMA if is_rgb else np.ascontiguousarray(_CHROMA[:, [2, 1, 0, 3]])

    def convert(self, image: npt.NDArray[np.uint8]) -> None:
        """Write an image into ``planes``.

        Shapes:
            image: uint8 [H, W, 3].
        """
        import cv2

        if any(self._padding):
            image = np.asarray(
                cv2.copyMakeBorder(image, *self._padding, cv2.BORDER_REPLICATE), np.uint8
            )
        cv2.cvtColor(image, self._code, dst=self.planes)
        # OpenCV takes one pixel's colour for four, which frays edges; their mean is wanted.
        height, width = self._half.shape[:2]
        cv2.resize(image, (width, height), dst=self._half, interpolation=cv2.INTER_AREA)
        cv2.transform(self._half, self._matrix, dst=self._mixed)
        cv2.mixChannels([self._mixed], self._chroma, [1, 0, 2, 1])
