"""Find photos and read them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv, install_command
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import SourceError
from zsseg_rt.photos.header import (
    HEIF_SUFFIXES,
    MAX_PIXELS,
    TiffTags,
    can_decode,
    check_picture,
    is_heif,
    open_heif,
    read_header,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)

OVERLAY_SUFFIXES, MASK_SUFFIX = {"png": ".overlay.png", "jpg": ".overlay.jpg"}, ".mask.png"
_RESULTS = (*OVERLAY_SUFFIXES.values(), MASK_SUFFIX)
SUFFIXES = (
    ".bmp", ".dib", ".jfif", ".jpe", ".jpeg", ".jpg", ".pjpeg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
_UNREADABLE = (
    ".gif", ".jp2", ".jxl", ".psd", ".svg",
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2",
)  # fmt: skip
_told: set[tuple[Path, int]] = set()  # folders whose photos' bits have been warned of
_LONGEST_FILE = 1 << 30  # bytes; or 8 per pixel (four 16-bit channels) if that is more


def find_photos(arguments: Sequence[str]) -> list[Path]:
    """Expand files, folders (not subfolders) and glob patterns to photos, each once, in order.

    Hidden files count only if named directly, and so does what ``segment`` writes. Images in a
    folder that cannot be read here, such as HEIC without a plug-in, are skipped and logged.
    """
    photos: dict[Path, None] = {}
    for argument in arguments:
        try:
            photos.update(dict.fromkeys(_expand(argument)))
        except OSError as exc:
            raise SourceError(f"{argument}: cannot be read: {exc.strerror}") from exc
    return list(photos)


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        expected = f"photos ({', '.join(SUFFIXES)}) in the folder"
        matches = _photos_in(path)
    else:
        expected = "a photo, folder or pattern"
        paths = glob.glob(argument, recursive=True)  # noqa: PTH207
        matches = sorted(p for p in map(Path, paths) if p.is_file())
    photos = [p for p in matches if not p.name.endswith(_RESULTS)]
    if not photos:
        what = f"only {len(matches)} results of an earlier run" if matches else "nothing"
        raise SourceError(f"{argument}: expected {expected}, found {what}")
    if len(photos) < len(matches):
        _log.warning(
            "%s: %d images %s, results of an earlier run, are skipped",
            argument, len(matches) - len(photos), ", ".join(f"*{end}" for end in _RESULTS),
        )  # fmt: skip
    return photos


def _photos_in(folder: Path) -> list[Path]:
    """The photos in a folder but hidden ones; the log tells of images that cannot be read."""
    readable = (*SUFFIXES, *filter(can_decode, HEIF_SUFFIXES))
    # On cards and drives that a Mac has seen, ._NAME.jpg lies beside every photo and is none.
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    unreadable = {*HEIF_SUFFIXES, *_UNREADABLE} - {*readable}
    skipped = [path.name for path in files if path.suffix.lower() in unreadable]
    if skipped:
        _log.warning(
            "%s: %d pictures cannot be read and are skipped: %s. Convert them; for HEIC and AVIF "
            "run: %s",
            folder, len(skipped), ", ".join(skipped[:3]) + (", ..." if skipped[3:] else ""),
            install_command("heif"),
        )  # fmt: skip
    return [path for path in files if path.suffix.lower() in readable]


def read_photo(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Read a photo as uint8 RGB [H, W, 3]; EXIF orientation is applied, and alpha ignored.

    Of samples of 16 bits, those bits count that the file states or uses; the log warns of fewer.

    Args:
        path: A BMP, JPEG, PNG, TIFF or WebP file; AVIF and HEIC where Pillow decodes them.
        max_pixels: Larger photos are not decoded; labelling takes 12 bytes per pixel.

    Raises:
        SourceError: The file cannot be read, is not an image, has too many pixels, or is cut off.
        BackendUnavailableError: OpenCV is not installed.
    """
    file = Path(path)
    return decode_photo(load_photo(file, max_pixels=max_pixels), file, max_pixels=max_pixels)


def load_photo(path: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return the content of a photo's file."""
    try:
        return read_limited(path, max_bytes=max(_LONGEST_FILE, 8 * max_pixels))
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror}. Is it a photo?") from exc


def pixels_of(data: bytes, name: object) -> int:
    """How many pixels a photo has, by its header."""
    try:
        height, width = read_header(data).size_hw
    except ValueError as exc:
        raise SourceError(f"{name}: {exc}") from exc
    return height * width


def decode_photo(data: bytes, path: Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Do what :func:`read_photo` does, with content that :func:`load_photo` has read."""
    cv2 = import_opencv("to read photos")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        header = check_picture(data, max_pixels=max_pixels)
        if is_heif(data):
            return _from_pillow(open_heif(data), path)
        file = TiffTags(data).for_opencv() if header.format == "TIFF" else data
        image: Any = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
    except ValueError as exc:
        raise SourceError(f"{path}: {exc}") from exc
    except cv2.error as exc:
        raise SourceError(f"{path}: cannot be decoded: {exc.err}") from exc
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise SourceError(
            f"{path}: expected an image file, got {len(data)} bytes that cannot be decoded. "
            "Copy the file again, or convert it to JPEG or PNG."
        )
    if image.dtype == np.uint16:
        image = _eight_bits(image, header.bits, path)
        if header.format == "TIFF" and TiffTags(data).zero_is_white:
            image = ~image
    rgb: npt.NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return _upright(rgb, header.orientation)


def _from_pillow(image: Image, path: Path) -> npt.NDArray[np.uint8]:
    from PIL import ImageOps

    try:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError) as exc:
        raise SourceError(f"{path}: cannot be decoded: {exc}") from exc


def _eight_bits(values: npt.NDArray[np.uint16], stated: int, path: Path) -> npt.NDArray[np.uint8]:
    """Samples of 16 bits as 8 of the bits that count: those stated, else those that are used."""
    highest = int(values.max(initial=0))
    bits = next(bits for bits in (8, 10, 12, 14, 16) if highest < 1 << bits)
    if stated:
        bits = max(stated, 8) if highest < 1 << stated else 16
    if highest and bits < 16 and (path.parent, bits) not in _told:  # once a folder
        _told.add((path.parent, bits))
        _log.warning("%s: 16-bit samples hold %d bits and are scaled from these", path, bits)
    return (values >> (bits - 8)).astype(np.uint8)


def _upright(image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """An image turned as EXIF says."""
    turned = image.transpose(1, 0, 2) if orientation > 4 else image
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(turned[::down, ::right])
