"""Read images and masks from files, and say plainly what is wrong with one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import DatasetError, SourceError
from zsseg_rt.photos import load_photo, read_photo
from zsseg_rt.photos.header import check_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Mask = NDArray[np.uint8] | NDArray[np.uint16]

_MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I")
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError)  # what Pillow raises on damaged files


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a photo, rotated as its EXIF data says.

    Returns:
        RGB, uint8 ``[H, W, 3]``.
    """
    try:
        return read_photo(path)
    except SourceError as error:
        raise DatasetError(str(error)) from error


def read_mask(path: Path) -> Mask:
    """Read the values of a mask with one channel, or of equal ones; a palette is not applied.

    Returns:
        uint8 or uint16 ``[H, W]``.
    """
    image = _open(path)
    greys = 1 if image.mode == "LA" else 3  # and no alpha
    values = _load(image, path) if image.mode in _MASK_MODES else None
    if values is None or (values.ndim == 3 and np.ptp(values[..., :greys], axis=-1).any()):
        raise DatasetError(
            f"{path}: expected a mask with one channel (grey or palette, 8 or 16 bits), got mode "
            f"{image.mode}. Save class indices; for colours, a folder takes a colours.txt."
        )
    values = values[..., 0] if values.ndim == 3 else values
    if values.dtype == bool:  # one bit per pixel
        return values.astype(np.uint8)
    if values.dtype in (np.uint8, np.uint16):
        return values
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DatasetError(
            f"{path}: expected 16-bit values, got {values.min()}..{values.max()}. "
            "Save the mask with class indices."
        )
    return values.astype(np.uint16)


def read_colour_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask of colours.

    Returns:
        RGB, uint8 ``[H, W, 3]``.
    """
    values: NDArray[np.uint8] = _load(_open(path), path, mode="RGB")
    return values


def _open(path: Path) -> Image:
    with needs_extra("data", "to read masks"):
        from PIL import Image
    try:
        data = load_photo(path)
        check_picture(data)
    except SourceError as error:
        raise DatasetError(str(error)) from error
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # Pillow's own limit, a little under ours
        raise DatasetError(f"{path}: {error}. Make the mask smaller.") from error
    except _PILLOW_ERRORS as error:
        raise _cut_off(path) from error


def _load(image: Image, path: Path, mode: str | None = None) -> NDArray[Any]:
    try:
        return np.array(image if mode in (None, image.mode) else image.convert(mode))
    except _PILLOW_ERRORS as error:
        raise _cut_off(path) from error


def _cut_off(path: Path) -> DatasetError:
    return DatasetError(
        f"{path}: expected a whole file, got one that is cut off or damaged. Download it again."
    )
