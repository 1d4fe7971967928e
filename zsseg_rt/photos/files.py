"""Find photos and read them."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv, install_command
from zsseg_rt.errors import SourceError
from zsseg_rt.photos.header import MAX_PIXELS, check_picture
from zsseg_rt.photos.heif import HEIF_SUFFIXES, can_decode, decode_heif, is_heif

_log = logging.getLogger(__name__)

OVERLAY_SUFFIXES, MASK_SUFFIX = {"png": ".overlay.png", "jpg": ".overlay.jpg"}, ".mask.png"
_RESULTS = (*OVERLAY_SUFFIXES.values(), MASK_SUFFIX)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_UNREADABLE = (
    ".gif", ".jfif", ".jp2", ".jxl", ".psd", ".svg",
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2",
)  # fmt: skip
_LONGEST_FILE = 1 << 30  # bytes; or 8 per pixel (four 16-bit channels) if that is more


def find_photos(arguments: Sequence[str]) -> list[Path]:
    """Expand files, folders (not subfolders) and glob patterns to photos, each once, in order.

    Hidden files, whose names begin with a dot, count only if named directly. Pictures in a folder
    that cannot be read here, such as HEIC without a plug-in, are skipped; the log counts and names
    them. What ``segment`` writes, ``*.overlay.png`` (or ``.jpg``) and ``*.mask.png``, counts as a
    photo only if named directly: in folders and patterns it is skipped, and the log says how many
    were.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        try:
            found.update(dict.fromkeys(_expand(argument)))
        except OSError as exc:
            raise SourceError(f"{argument}: cannot be read: {exc.strerror}") from exc
    return list(found)


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
    """The photos in a folder but hidden ones; the log tells of pictures that cannot be read.

    On cards and drives that a Mac has seen, ``._NAME.jpg`` lies beside every photo and is none.
    """
    readable = (*SUFFIXES, *filter(can_decode, HEIF_SUFFIXES))
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    skipped = [
        path for path in files
        if (suffix := path.suffix.lower()) not in readable
        and suffix in (*HEIF_SUFFIXES, *_UNREADABLE)
    ]  # fmt: skip
    if skipped:
        heif = any(path.suffix.lower() in HEIF_SUFFIXES for path in skipped)
        advice = f"For HEIC and AVIF run: {install_command('heif')}" if heif else "Convert them."
        named = ", ".join(path.name for path in skipped[:3]) + (", ..." if skipped[3:] else "")
        _log.warning(
            "%s: %d pictures cannot be read and are skipped: %s. %s",
            folder, len(skipped), named, advice,
        )  # fmt: skip
    return [path for path in files if path.suffix.lower() in readable]


def read_photo(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Read a photo as uint8 RGB [H, W, 3]; EXIF orientation is applied.

    Args:
        path: A BMP, JPEG, PNG, TIFF or WebP file; AVIF and HEIC where Pillow decodes them.
        max_pixels: Larger photos are not decoded; labelling takes 12 bytes per pixel.

    Raises:
        SourceError: The file cannot be read, is not an image, has too many pixels, or is too short
            for the pixels that it claims.
        BackendUnavailableError: OpenCV is not installed.
    """
    file = Path(path)
    return decode_photo(load_photo(file, max_pixels=max_pixels), file, max_pixels=max_pixels)


def load_photo(path: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return the content of a photo's file."""
    longest = max(_LONGEST_FILE, 8 * max_pixels)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(longest + 1) if size <= longest else b""
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror}") from exc
    if max(size, len(data)) > longest:
        raise SourceError(f"{path}: expected at most {longest} bytes, got {size}. Is it a photo?")
    return data


def decode_photo(data: bytes, path: Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Do what :func:`read_photo` does, with content that :func:`load_photo` has read."""
    cv2 = import_opencv("to read photos")
    try:
        check_picture(data, max_pixels=max_pixels)
        if is_heif(data):
            return decode_heif(data, path)
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except ValueError as exc:
        raise SourceError(f"{path}: {exc}") from exc
    except cv2.error as exc:
        raise SourceError(f"{path}: cannot be decoded: {exc.err}") from exc
    if picture is None:
        raise SourceError(
            f"{path}: expected an image file, got {len(data)} bytes that cannot be decoded. "
            "Copy the file again, or convert it to JPEG or PNG."
        )
    rgb: npt.NDArray[np.uint8] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=picture)
    return rgb
