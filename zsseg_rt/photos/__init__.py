"""Find photos and read them.

How large an image is and what its samples mean is read before anything is decoded: a few bytes can
claim gigabytes, and decoders allocate memory for the size that the header states.
"""

from __future__ import annotations

import glob
import importlib.util
import io
import logging
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv, install_command, needs_extra
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)

MAX_PIXELS = 200_000_000
"""The largest photo that is decoded unless a caller allows more: phones and medium format cameras
take up to 16320x12240. Labelling one takes 2.3 GB."""

OVERLAY_SUFFIXES, MASK_SUFFIX = {"png": ".overlay.png", "jpg": ".overlay.jpg"}, ".mask.png"
_RESULTS = (*OVERLAY_SUFFIXES.values(), MASK_SUFFIX)
SUFFIXES = (
    ".bmp", ".dib", ".jfif", ".jpe", ".jpeg", ".jpg", ".pjpeg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
_UNREADABLE = (
    ".gif", ".jp2", ".jxl", ".psd", ".svg",
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2",
)  # fmt: skip
HEIF_SUFFIXES = (".avif", ".heic", ".heif", ".hif")
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


_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"))
_LARGEST_TILE = 4096 * 4096  # pixels of a tile that may be larger than the image
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of markers followed by a length
_JPEG_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_MOST_SEGMENTS = 65536
_EXIF, _LONGEST_EXIF = b"Exif\0\0", 1 << 20


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """The header of an image, and where its file must end."""

    format: str  # Name of the file format
    size_hw: tuple[int, int]  # Height and width in pixels, before EXIF orientation
    end: int = 0  # Bytes of a whole file, as far as it tells; longer than one that lacks its end
    orientation: int = 1  # EXIF's, 1 (upright) to 8
    bits: int = 0  # How many bits of a sample count, as far as the file states it; else 0


def check_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> PictureHeader:
    """Refuse an image that is cut off, or has more pixels than it may have."""
    header = read_header(data)
    height, width = header.size_hw
    if height * width > max_pixels:
        raise ValueError(
            f"expected at most {max_pixels} pixels, got {width}x{height} = {height * width}. "
            "Make the image smaller, or raise the limit if you trust the file."
        )
    if len(data) < header.end:
        raise ValueError(
            f"expected at least {header.end} bytes for a {header.format} image of "
            f"{width}x{height} pixels, got {len(data)}. The image file is cut off or damaged; "
            "copy it again."
        )
    return header


def read_header(data: bytes) -> PictureHeader:
    """Read the header of an AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP file."""
    if is_heif(data):
        size = open_heif(data).size
        return PictureHeader(format="HEIF", size_hw=(size[1], size[0]))
    for magics, read in _READERS:
        if data.startswith(magics):
            try:
                header = read(data)
                if min(header.size_hw) < 1:
                    raise ValueError("no pixels")
            except (struct.error, IndexError, ValueError) as exc:
                raise ValueError(
                    f"expected an image file, got {len(data)} bytes whose header is cut off or "
                    "damaged. Copy the file again."
                ) from exc
            return header
    raise ValueError(
        f"expected an image file, got {len(data)} bytes in no known image format. "
        "Use AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP."
    )


def _read_png(data: bytes) -> PictureHeader:
    kind, width, height = struct.unpack_from(">8sII", data, 8)
    if kind != b"\0\0\0\rIHDR":
        raise ValueError
    position, chunk, parts = 8, b"", {}
    while chunk != b"IEND" and position + 8 <= len(data):  # the last one; what follows is no image
        length, chunk = struct.unpack_from(">I4s", data, position)
        if chunk in (b"eXIf", b"sBIT"):
            parts[chunk] = data[position + 8 : position + 8 + min(length, _LONGEST_EXIF)]
        position += 12 + length
    return PictureHeader(
        format="PNG", size_hw=(height, width),
        end=position if chunk == b"IEND" else len(data) + 1,
        orientation=_orientation(parts.get(b"eXIf", b"")), bits=max(parts.get(b"sBIT") or b"\0"),
    )  # fmt: skip


def _read_jpeg(data: bytes) -> PictureHeader:
    """Walk the segments and scans; what follows the end mark, as a phone's film, is no image."""
    position, size_hw, exif, end = 2, (0, 0), b"", len(data) + 1
    for _ in range(_MOST_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)  # decoders skip what is between segments
        if marker and marker[1] == b"\xd9":
            end = marker.end()
        if end <= len(data) or marker is None or marker.end() + 2 > len(data):
            break
        start = marker.end() + 2
        (length,) = struct.unpack_from(">H", data, marker.end())
        if marker[1] in _JPEG_FRAMES and not any(size_hw):
            size_hw = struct.unpack_from(">HH", data, start + 1)
        elif marker[1] == b"\xe1" and not exif and data.startswith(_EXIF, start):
            exif = data[start : start + length - 2]
        position = marker.end() + max(length, 2)
    return PictureHeader(format="JPEG", size_hw=size_hw, end=end, orientation=_orientation(exif))


def _read_bmp(data: bytes) -> PictureHeader:
    start, size = struct.unpack_from("<II", data, 10)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        packing = 0
    else:
        width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: the first row is the top one
    if packing in (1, 2):
        end = start + int.from_bytes(data[34:38], "little")
    else:
        row, stride = -(-width * bits // 8), -(-width * bits // 32) * 4
        end = start + (height - 1) * stride + row  # the last row's padding may be missing
    return PictureHeader(format="BMP", size_hw=(height, width), end=end)


def _read_webp(data: bytes) -> PictureHeader:
    kind = data[12:16] if data[8:12] == b"WEBP" else b""
    position, end, exif = 12, 8 + int.from_bytes(data[4:8], "little"), b""
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        while not exif and position + 8 <= min(end, len(data)):
            chunk, length = struct.unpack_from("<4sI", data, position)
            if chunk == b"EXIF":
                exif = data[position + 8 : position + 8 + min(length, _LONGEST_EXIF)]
            position += 8 + length + length % 2
    elif kind == b"VP8L" and data[20] == 0x2F:
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError
    orientation = _orientation(exif)
    return PictureHeader(format="WebP", size_hw=(height, width), end=end, orientation=orientation)


def _read_tiff(data: bytes) -> PictureHeader:
    tags = TiffTags(data)
    width, height = tags.value(_WIDTH), tags.value(_HEIGHT)
    tile = tags.value(_TILE_WIDTH, 1) * tags.value(_TILE_HEIGHT, 1)
    if tags.repeats or tile > max(width * height, _LARGEST_TILE):
        raise ValueError
    pieces = [zip(tags.values(at), tags.values(size), strict=False) for at, size in _PIECES]
    return PictureHeader(
        format="TIFF", size_hw=(height, width),
        end=max((at + size for piece in pieces for at, size in piece), default=0),
        orientation=_orientation(data), bits=max(tags.values(_LARGEST_VALUE, 0)).bit_length(),
    )  # fmt: skip


def _orientation(exif: bytes) -> int:
    """The orientation that EXIF data or a TIFF state; 1 where they state none that is known."""
    try:
        (value,) = TiffTags(exif.removeprefix(_EXIF)).values(_ORIENTATION, 1)
    except (struct.error, ValueError):
        return 1
    return value if value in range(1, 9) else 1


_READERS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], PictureHeader]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), _read_png),
    ((b"\xff\xd8\xff",), _read_jpeg),
    ((b"BM",), _read_bmp),
    ((b"RIFF",), _read_webp),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _read_tiff),
)


def is_heif(data: bytes) -> bool:
    """Whether a file is in one of these formats, by its first bytes."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def can_decode(suffix: str) -> bool:
    """Whether files with one of these suffixes can be decoded here, as far as packages tell."""
    if _has("pillow_heif") or suffix.lower() != ".avif" or not _has("PIL"):
        return _has("pillow_heif")
    try:
        from PIL import features
    except ImportError:
        return True  # reading one says what is wrong
    return bool(features.check("avif"))


def open_heif(data: bytes) -> Image:
    """A photo whose header has been read."""
    suffix = ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    if not can_decode(suffix):
        raise ValueError(
            f"expected a package that decodes {suffix[1:].upper()} photos, got none. "
            f"Run: {install_command('heif')}"
        )
    with needs_extra("heif", f"to decode {suffix[1:].upper()} photos"):
        from PIL import Image

        if _has("pillow_heif"):
            import pillow_heif

            pillow_heif.register_heif_opener()
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, RuntimeError, Image.DecompressionBombError) as exc:
        raise ValueError(f"cannot be decoded: {exc}") from exc


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_WIDTH, _HEIGHT, _BITS, _COLOURS, _ORIENTATION, _CHANNELS = 256, 257, 258, 262, 274, 277
_LARGEST_VALUE, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _NUMBERS = 281, 284, 322, 323, 338, 339
_PIECES = ((324, 325), (273, 279))  # where tiles or strips lie, and how long they are
_GREY, _RGB = 1, 2
_ANY_BITS = (1, 2, 4, 8, 10, 12, 14, 16)
_SAMPLES = {
    **{(0, 1): _ANY_BITS, (_GREY, 1): _ANY_BITS, (0, 2): (8,), (_GREY, 2): (8,)},
    **{(_RGB, 3): (8, 16), (_RGB, 4): (8, 16), (3, 1): _ANY_BITS[:4]},
    **{(5, 4): (8,), (6, 3): (8,)},  # CMYK, YCbCr
}  # colours as numbered by TIFF, and channels with alpha, by the bits that OpenCV reads
_KINDS = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4), 16: ("Q", 8)}
_MOST_VALUES = 1 << 20


class TiffTags:
    """The tags of the first image of a TIFF; EXIF data have the same form."""

    def __init__(self, data: bytes) -> None:
        order, self._is_big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
        self._data, self._order = data, order
        self._place, self._number, self._head = "QQQ" if self._is_big else "IHI"
        self._head = f"{order}HH{self._head}"
        (start,) = struct.unpack_from(order + self._place, data, 8 if self._is_big else 4)
        (count,) = struct.unpack_from(order + self._number, data, start)
        start += struct.calcsize(order + self._number)
        self._inline = struct.calcsize(order + self._place)
        size = struct.calcsize(self._head) + self._inline
        if start + min(count, 65536) * size > len(data):
            raise ValueError
        rows = [data[at : at + size] for at in range(start, start + min(count, 65536) * size, size)]
        self._rows = {struct.unpack_from(order + "H", row)[0]: row for row in rows}
        self.repeats = len(self._rows) < len(rows)  # a tag

    def values(self, tag: int, *default: int) -> tuple[int, ...]:
        """The values of a tag of whole numbers."""
        if tag not in self._rows:
            return default
        source, at = self._rows[tag], struct.calcsize(self._head)
        _, kind, count = struct.unpack_from(self._head, source)
        letter, size = _KINDS.get(kind, ("B", 1))
        if count * size > self._inline:
            (at,) = struct.unpack_from(self._order + self._place, source, at)
            source = self._data
        if kind not in _KINDS or count > _MOST_VALUES or at + count * size > len(source):
            raise ValueError(f"TIFF tag {tag} is damaged. Copy the file again.")
        return struct.unpack_from(f"{self._order}{count}{letter}", source, at)

    def value(self, tag: int, *default: int) -> int:
        """The value of a tag of one number, or of several equal ones."""
        values = set(self.values(tag, *default))
        if len(values) != 1:
            raise ValueError(f"expected one number in TIFF tag {tag}, got {sorted(values)[:9]}.")
        return values.pop()

    @property
    def zero_is_white(self) -> bool:
        """Whether samples are dark where they are large."""
        return self.values(_COLOURS) == (0,)

    def for_opencv(self) -> bytes:
        """The image as a file that OpenCV reads rightly.

        OpenCV knows less than a file may state, and in part ignores it: orientation is applied or
        not by its version, colours that no tag names become the first channel alone, alpha darkens,
        and of 16 bits a channel in planes of their own it reads the first plane as all three.
        """
        bits, channels = self.value(_BITS, 1), self.value(_CHANNELS, 1)
        colours, numbers = self.value(_COLOURS, _GREY), set(self.values(_NUMBERS, 1))
        if (colours, channels) == (_GREY, 3):  # as GDAL writes three bands
            colours = _RGB
        is_known = bits in _SAMPLES.get((colours, channels), ()) and not numbers - {1, 4}
        has_alpha = bool({1, 2} & set(self.values(_EXTRA)))
        in_planes = bits > 8 and channels > 2 and self.value(_PLANAR, 1) == 2
        if not is_known or in_planes or (channels == 2 and not has_alpha):
            raise ValueError(
                "expected a TIFF of RGB or grey in whole numbers of 8 or 16 bits, those not in "
                f"planes, got {channels} channels of {bits} bits ({sorted(numbers)[-1]} in "
                f"SampleFormat, {colours} in PhotometricInterpretation). Scale it and convert it "
                "to JPEG or PNG."
            )
        changes: dict[int, int | None] = {_ORIENTATION: None, _COLOURS: colours}
        if channels != 2:
            changes[_EXTRA] = 0 if (colours, channels) == (_RGB, 4) else None
        return self._with(changes)

    def _with(self, changes: dict[int, int | None]) -> bytes:
        """The file with another directory at its end: other values of some tags, or none."""
        order, kind, rows = self._order, 16 if self._is_big else 4, dict(self._rows)
        for tag, value in changes.items():
            rows.pop(tag, None)
            if value is not None:
                rows[tag] = struct.pack(self._head + self._place, tag, kind, 1, value)
        changed = bytearray(self._data + bytes(len(self._data) % 2))
        at = 8 if self._is_big else 4
        changed[at : at + self._inline] = struct.pack(order + self._place, len(changed))
        changed += struct.pack(order + self._number, len(rows))
        changed += b"".join(rows[tag] for tag in sorted(rows)) + bytes(self._inline)
        return bytes(changed)
