"""From decoded frames to images: channels in order, and upright."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.runtime.inputs.nv12 import Nv12Frame


class Converter:
    """Makes the images of one video.

    One converter for all frames halves the time of each: PyAV's shortcut makes one per frame, with
    threads of its own.
    """

    def __init__(self, channel_order: str, *, turns: bool) -> None:
        from av.video.reformatter import VideoReformatter

        self._format = "rgb24" if channel_order == "rgb" else "bgr24"
        self._convert: Any = VideoReformatter().reformat
        self._turns = turns
        self._matrix: tuple[int, ...] | None = None

    def image(self, frame: Any) -> npt.NDArray[np.uint8]:
        """An image in memory that nothing else writes to, uint8 [H, W, 3], C-contiguous."""
        if self._turns:
            self._matrix, self._turns = _display_matrix(frame), False
        image = self._convert(frame, format=self._format).to_ndarray()
        if frame.format.name == self._format:
            image = image.copy()  # it would be the decoder's memory, or the driver's
        # From PyAV 17 on it is a view of rows that are padded to a multiple of 16 pixels.
        return upright(np.ascontiguousarray(image), self._matrix)


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """FFmpeg's nine numbers of how to show a frame, or None."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return tuple(np.frombuffer(data, np.int32)[:9].tolist())
    return None


def upright(image: npt.NDArray[np.uint8], matrix: Sequence[int] | None) -> npt.NDArray[np.uint8]:
    """Turn and mirror an image as its display matrix says.

    A pixel at x to the right and y down is shown at ``(a x + c y, b x + d y)``, but for a shift.

    Shapes:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3] or [W, H, 3], C-contiguous; ``image`` itself where nothing is to be done.
    """
    if matrix is None:
        return image
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if a and d and not b and not c:
        right, down = a, d
    elif b and c and not a and not d:
        right, down = c, b
    else:
        return image
    import cv2

    if b:
        image = np.asarray(cv2.transpose(image), np.uint8)
    if right > 0 and down > 0:
        return image
    around = -1 if right < 0 and down < 0 else int(right < 0)  # both axes, the vertical, the other
    return np.asarray(cv2.flip(image, around), np.uint8)


def host_picture(frame: Nv12Frame, channel_order: str) -> npt.NDArray[np.uint8]:
    """Copy a frame of ours to the CPU, as uint8 [H, W, 3]; within 1 of what the kernels see."""
    import cv2

    from zsseg_rt.ops.reference_preprocess import YUV_TO_RGB

    luma, chroma = frame.luma.numpy(), frame.chroma.numpy()
    black, y, v_red, u_green, v_green, u_blue = YUV_TO_RGB[frame.colour_matrix]
    rows = np.array([[y, 0, v_red], [y, u_green, v_green], [y, u_blue, 0]]) / 2**20
    matrix = np.column_stack([rows, -rows @ [black, 128, 128]])
    if channel_order == "bgr":
        matrix = matrix[::-1]
    chroma = cv2.resize(chroma, luma.shape[::-1], interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.transform(cv2.merge([luma, chroma]), matrix), np.uint8)
