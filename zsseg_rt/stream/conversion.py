"""From decoded frames to upright images, or to a GPU; from images to what encoders take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import gpu_index
from zsseg_rt.runtime.frames import Nv12Frame

# FFmpeg's AVColorSpace: BT.709; none, BT.470BG and SMPTE 170M, which it takes for BT.601.
_COLOURS = MappingProxyType({1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"})
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class Uploads:
    """Takes frames to a GPU, in one thread; they are there when a method returns."""

    def __init__(self, device: str, channel_order: str) -> None:
        from zsseg_rt.ops import core

        self._core, self._index, self._order = core, gpu_index(device), channel_order
        core.cuda_set_device(self._index)
        self._stream = core.Stream(self._index)
        self._reads_in_place = core.cuda_device_properties(self._index)["integrated"]
        self._pinned: dict[tuple[int, ...], Any] = {}

    def planes(self, luma: Any, colours: Sequence[Any], matrix: str) -> dict[str, Any]:
        """The fields of a picture from planes, even sides; U and V are two or one [h, w, 2]."""
        import cv2

        height, width = luma.shape
        pinned = [self._memory(luma.shape), self._memory((height // 2, width // 2, 2))]
        np.copyto(pinned[0].host, luma)
        if len(colours) == 1:
            np.copyto(pinned[1].host, colours[0])
        else:
            cv2.merge(list(colours), dst=pinned[1].host)
        frame = Nv12Frame(self._placed(pinned[0]), self._placed(pinned[1]), matrix)
        self._stream.synchronize()
        return {"image": partial(host_picture, frame, self._order), "on_gpu": frame}

    def image(self, image: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """The fields of a picture from uint8 [H, W, 3], whose rows may lie apart."""
        pinned = self._memory(image.shape)
        np.copyto(pinned.host, image)
        frame = self._placed(pinned)
        self._stream.synchronize()
        return {"image": partial(self._core.outside_captures, frame.numpy), "on_gpu": frame}

    def _memory(self, shape: tuple[int, ...]) -> Any:
        """Pinned memory; the same again once it was copied from."""
        if self._reads_in_place or shape not in self._pinned:
            self._pinned = {s: p for s, p in self._pinned.items() if len(self._pinned) < 4}
            self._pinned[shape] = self._core.PinnedArray(shape, "uint8", device=self._index)
        return self._pinned[shape]

    def _placed(self, pinned: Any) -> Any:
        stream = self._stream.handle
        if self._reads_in_place:
            return pinned.mapped(stream)
        array = self._core.DeviceArray.empty(
            pinned.shape, "uint8", device=self._index, stream=stream
        )
        array.copy_from(pinned.host, stream=stream)
        return array


class Converter:
    """Makes the images of one video; PyAV's shortcut would make a converter per frame."""

    def __init__(self, channel_order: str, *, turns: bool, device: str = "cpu") -> None:
        from av.video.reformatter import VideoReformatter

        self._format = "rgb24" if channel_order == "rgb" else "bgr24"
        self._convert: Any = VideoReformatter().reformat
        self._turns = turns
        self._matrix: tuple[int, ...] | None = None
        self._uploads = None if device == "cpu" else Uploads(device, channel_order)

    def take(self, frame: Any) -> dict[str, Any]:
        """A picture's fields from a frame: ``image``, for an engine on a GPU also ``on_gpu``."""
        if self._turns:
            self._matrix, self._turns = _display_matrix(frame), False
        uploads = self._uploads
        if uploads and self._matrix is None and (planes := _planes_of(frame)) is not None:
            return uploads.planes(*planes)
        image = self._convert(frame, format=self._format).to_ndarray()
        if frame.format.name == self._format:
            image = image.copy()  # it would be the decoder's memory, or the driver's
        # From PyAV 17 on it is a view of rows that are padded to a multiple of 16 pixels.
        image = upright(np.ascontiguousarray(image), self._matrix)
        return {"image": image} if uploads is None else uploads.image(image)


def _planes_of(frame: Any) -> tuple[Any, list[Any], str] | None:
    """Brightness, colours and matrix of a frame that needs no conversion for a GPU; else None."""
    height, width, kind = frame.height, frame.width, frame.format.name
    matrix = _COLOURS.get(int(frame.colorspace))
    if kind not in ("yuv420p", "yuvj420p", "nv12") or height % 2 or width % 2 or matrix is None:
        return None
    is_full = kind == "yuvj420p" or int(frame.color_range) == _FULL_RANGE
    half = (height // 2, width // 2)
    shapes = [(height, width), (*half, 2)] if kind == "nv12" else [(height, width), half, half]
    planes = []
    for plane, shape in zip(frame.planes, shapes, strict=True):
        row = shape[1] * (shape[2] if len(shape) == 3 else 1)
        if plane.line_size < row:
            return None  # upside down
        rows = np.frombuffer(plane, np.uint8)[: plane.line_size * shape[0]]
        planes.append(rows.reshape(shape[0], plane.line_size)[:, :row].reshape(shape))
    return planes[0], planes[1:], matrix + ("-full" if is_full else "")


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """FFmpeg's nine numbers of how to show a frame, or None."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return tuple(np.frombuffer(data, np.int32)[:9].tolist())
    return None


def upright(image: npt.NDArray[np.uint8], matrix: Sequence[int] | None) -> npt.NDArray[np.uint8]:
    """Turn and mirror an image as its display matrix says, if that is by multiples of 90 degrees.

    A pixel at x to the right and y down is shown at ``(a x + c y, b x + d y)``, but for a shift.
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
    """Copy a frame of ours to the CPU, as uint8 [H, W, 3]: what the kernels see."""
    from zsseg_rt import ops
    from zsseg_rt.ops import core

    luma, chroma = (core.outside_captures(one.numpy) for one in (frame.luma, frame.chroma))
    no_labels, no_colours = np.zeros(luma.shape, np.uint8), np.empty((0, 3), np.uint8)
    matrix = frame.colour_matrix
    return np.asarray(
        ops.overlay(
            (luma, chroma), no_labels, no_colours,
            channel_order=channel_order, colour_matrix=matrix,
        )
    )  # fmt: skip


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
    """The image, or every second, third, ... pixel where a side is longer than H.264 takes."""
    step = -(-max(image.shape[:2]) // _MOST_SIDE)
    return np.ascontiguousarray(image[::step, ::step])


def i420(
    image: npt.NDArray[np.uint8], channel_order: str, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Y of an image, then U and V at half its size; several times faster than FFmpeg does it.

    Returns:
        uint8 [H * 3 / 2, W]; odd sides are made even by repeating the last row or column.
    """
    import cv2

    rows, columns = (side % 2 for side in image.shape[:2])
    if rows or columns:
        padded = cv2.copyMakeBorder(image, 0, rows, 0, columns, cv2.BORDER_REPLICATE)
        image = np.asarray(padded, np.uint8)
    height, width = image.shape[0] // 2, image.shape[1] // 2
    is_rgb = channel_order == "rgb"
    code = cv2.COLOR_RGB2YUV_I420 if is_rgb else cv2.COLOR_BGR2YUV_I420
    planes = np.asarray(cv2.cvtColor(image, code, dst=out), np.uint8)
    # OpenCV takes one pixel's colour for four, which frays edges; their mean is wanted.
    half = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    mixed = cv2.transform(half, _CHROMA if is_rgb else _CHROMA[:, [2, 1, 0, 3]])
    chroma = planes[2 * height :].reshape(2, height, width)
    cv2.mixChannels([mixed], list(chroma), [1, 0, 2, 1])
    return planes
