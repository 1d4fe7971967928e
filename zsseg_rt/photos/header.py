"""How large an image is and what its samples mean, read before anything is decoded.

A few bytes can claim gigabytes: decoders allocate memory for the size that the header states. Here
the size is compared with a limit, and with the most that a file of this length can hold.

Sources: PNG and its deflate (RFC 2083, RFC 1951), ITU-T T.81 (JPEG), TIFF 6.0 and BigTIFF, RFC 9649
(WebP), Microsoft's BITMAPINFOHEADER, CIPA DC-008 (EXIF).
"""

from __future__ import annotations

import importlib.util
import io
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zsseg_rt.common.extras import install_command, needs_extra

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PIXELS = 200_000_000
"""The largest photo that is decoded unless a caller allows more: phones and medium format cameras
take up to 16320x12240. Labelling one takes 2.3 GB."""

_DEFLATE = 1032  # the most bytes that one byte of deflate becomes: 258 for two bits
_LZW = 2560  # the longest string of a table of 4096 entries, 3838 bytes, for a code of 12 bits
_PACKBITS = 64  # 128 for two bytes
_JPEG = 2048  # pixels; a block of 8x8 takes a bit or more, and components may be subsampled
_BMP_RUNS = 1024  # pixels; a run of 255 takes two bytes
_TIFF_RATIOS = {1: 1, 5: _LZW, 8: _DEFLATE, 32773: _PACKBITS, 32946: _DEFLATE}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
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
    # No complete file of this format and size is shorter; longer than the file, if that lacks its
    # end
    least_bytes: int
    orientation: int = 1  # EXIF's, 1 (upright) to 8
    bits: int = 0  # How many bits of a sample count, as far as the file states it; else 0


def check_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> PictureHeader:
    """Refuse an image that is cut off, or may not or cannot be as large as its header says."""
    header = read_header(data)
    height, width = header.size_hw
    if height * width > max_pixels:
        raise ValueError(
            f"expected at most {max_pixels} pixels, got {width}x{height} = {height * width}. "
            "Make the image smaller, or raise the limit if you trust the file."
        )
    if len(data) < header.least_bytes:
        raise ValueError(
            f"expected at least {header.least_bytes} bytes for a {header.format} image of "
            f"{width}x{height} pixels, got {len(data)}. The image file is cut off or damaged; "
            "copy it again."
        )
    return header


def read_header(data: bytes) -> PictureHeader:
    """Read the header of an AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP file."""
    if is_heif(data):  # as in WebP, an image of one colour takes next to nothing
        size = open_heif(data).size
        return PictureHeader(format="HEIF", size_hw=(size[1], size[0]), least_bytes=0)
    for magics, read in _READERS:
        if data.startswith(magics):
            try:
                header = read(data)
            except (struct.error, IndexError, ValueError) as exc:
                raise ValueError(_DAMAGED.format(len(data))) from exc
            if min(header.size_hw) < 1:
                raise ValueError(_DAMAGED.format(len(data)))
            return header
    raise ValueError(
        f"expected an image file, got {len(data)} bytes in no known image format. "
        "Use AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP."
    )


_DAMAGED = (
    "expected an image file, got {} bytes whose header is cut off or damaged. Copy the file again."
)


def _read_png(data: bytes) -> PictureHeader:
    kind, width, height, depth, colour = struct.unpack_from(">8sIIBB", data, 8)
    if kind != b"\0\0\0\rIHDR" or colour not in _PNG_CHANNELS:
        raise ValueError
    row_bytes = -(-width * depth * _PNG_CHANNELS[colour] // 8)
    position, chunk, parts = 8, b"", {}
    while chunk != b"IEND" and position + 8 <= len(data):  # the last one; what follows is no image
        length, chunk = struct.unpack_from(">I4s", data, position)
        if chunk in (b"eXIf", b"sBIT"):
            parts[chunk] = data[position + 8 : position + 8 + min(length, _LONGEST_EXIF)]
        position += 12 + length
    least = max(height * row_bytes // _DEFLATE, position if chunk == b"IEND" else len(data) + 1)
    return PictureHeader(
        format="PNG", size_hw=(height, width), least_bytes=least,
        orientation=_orientation(parts.get(b"eXIf", b"")), bits=max(parts.get(b"sBIT") or b"\0"),
    )  # fmt: skip


def _read_jpeg(data: bytes) -> PictureHeader:
    """Walk the segments and scans; what follows the end mark, as a phone's film, is no image."""
    position, size_hw, exif, least = 2, (0, 0), b"", len(data) + 1
    for _ in range(_MOST_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)  # decoders skip what is between segments
        if marker and marker[1] == b"\xd9":
            least = marker.end()
        if least <= len(data) or marker is None or marker.end() + 2 > len(data):
            break
        start = marker.end() + 2
        (length,) = struct.unpack_from(">H", data, marker.end())
        if marker[1] in _JPEG_FRAMES and not any(size_hw):
            size_hw = struct.unpack_from(">HH", data, start + 1)
        elif marker[1] == b"\xe1" and not exif and data.startswith(_EXIF, start):
            exif = data[start : start + length - 2]
        position = marker.end() + max(length, 2)
    least = max(least, size_hw[0] * size_hw[1] // _JPEG)
    return PictureHeader(
        format="JPEG", size_hw=size_hw, least_bytes=least, orientation=_orientation(exif)
    )


def _read_bmp(data: bytes) -> PictureHeader:
    start, size = struct.unpack_from("<II", data, 10)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        packing = 0
    else:
        width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: the first row is the top one
    if packing in (1, 2):
        least = max(width * height // _BMP_RUNS, start + int.from_bytes(data[34:38], "little"))
    else:
        row, stride = -(-width * bits // 8), -(-width * bits // 32) * 4
        least = start + (height - 1) * stride + row  # the last row's padding may be missing
    return PictureHeader(format="BMP", size_hw=(height, width), least_bytes=least)


def _read_webp(data: bytes) -> PictureHeader:
    # A WebP image of one colour takes a few bytes whatever its size, so nothing bounds it.
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
    return PictureHeader(
        format="WebP", size_hw=(height, width), least_bytes=end, orientation=_orientation(exif)
    )


def _read_tiff(data: bytes) -> PictureHeader:
    tags = TiffTags(data)
    width, height = tags.value(WIDTH), tags.value(HEIGHT)
    tile = tags.value(TILE_WIDTH, 1) * tags.value(TILE_HEIGHT, 1)
    if tile > max(width * height, _LARGEST_TILE):
        raise ValueError
    ratio = _TIFF_RATIOS.get(tags.value(PACKING, 1))
    least = 0 if ratio is None else width * height // 8 // ratio  # at least a bit per pixel
    return PictureHeader(
        format="TIFF", size_hw=(height, width), least_bytes=max(least, tags.end),
        orientation=_orientation(data), bits=max(tags.values(LARGEST_VALUE, 0)).bit_length(),
    )  # fmt: skip


def _orientation(exif: bytes) -> int:
    """The orientation that EXIF data or a TIFF state; 1 where they state none that is known."""
    try:
        (value,) = TiffTags(exif.removeprefix(_EXIF)).values(ORIENTATION, 1)
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


HEIF_SUFFIXES = (".avif", ".heic", ".heif", ".hif")


def is_heif(data: bytes) -> bool:
    """Whether a file is in one of these formats, by its first bytes."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def can_decode(suffix: str) -> bool:
    """Whether files with one of these suffixes can be decoded here, as far as packages tell."""
    return _has("pillow_heif") or (suffix.lower() == ".avif" and _pillow_has_avif())


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


_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"))


def _pillow_has_avif() -> bool:
    if not _has("PIL"):
        return False
    try:
        from PIL import features
    except ImportError:
        return True  # reading one says what is wrong
    return bool(features.check("avif"))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


WIDTH, HEIGHT, PACKING, ORIENTATION, LARGEST_VALUE = 256, 257, 259, 274, 281
TILE_WIDTH, TILE_HEIGHT = 322, 323
_BITS, _COLOURS, _CHANNELS, _PLANAR, _EXTRA, _NUMBERS = 258, 262, 277, 284, 338, 339
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
        self._place, number, self._head = ("Q", "Q", "HHQ") if self._is_big else ("I", "H", "HHI")
        (start,) = struct.unpack_from(order + self._place, data, 8 if self._is_big else 4)
        (count,) = struct.unpack_from(order + number, data, start)
        start += struct.calcsize(order + number)
        self._number, self._inline = number, struct.calcsize(order + self._place)
        size = struct.calcsize(order + self._head) + self._inline
        if start + min(count, 65536) * size > len(data):
            raise ValueError
        rows = [data[at : at + size] for at in range(start, start + min(count, 65536) * size, size)]
        tags = [struct.unpack_from(order + "H", row)[0] for row in rows]
        self._rows = dict(zip(tags, rows, strict=True))
        self._repeated = {tag for tag, times in Counter(tags).items() if times > 1}

    def values(self, tag: int, *default: int) -> tuple[int, ...]:
        """The values of a tag of whole numbers."""
        if tag not in self._rows:
            return default
        source, at = self._rows[tag], struct.calcsize(self._order + self._head)
        _, kind, count = struct.unpack_from(self._order + self._head, source)
        letter, size = _KINDS.get(kind, ("B", 1))
        if count * size > self._inline:
            (at,) = struct.unpack_from(self._order + self._place, source, at)
            source = self._data
        whole = kind in _KINDS and count <= _MOST_VALUES and at + count * size <= len(source)
        if tag in self._repeated or not whole:
            raise ValueError(f"TIFF tag {tag} is damaged. Copy the file again.")
        return struct.unpack_from(f"{self._order}{count}{letter}", source, at)

    def value(self, tag: int, *default: int) -> int:
        """The value of a tag of one number, or of several equal ones."""
        values = set(self.values(tag, *default))
        if len(values) != 1:
            raise ValueError(f"expected one number in TIFF tag {tag}, got {sorted(values)[:9]}.")
        return values.pop()

    @property
    def end(self) -> int:
        """Where the last piece of the image ends."""
        pieces = [zip(self.values(at), self.values(length), strict=False) for at, length in _PIECES]
        return max((at + length for piece in pieces for at, length in piece), default=0)

    @property
    def zero_is_white(self) -> bool:
        """Whether samples are dark where they are large."""
        return self.values(_COLOURS) == (0,)

    def for_opencv(self) -> Iterator[bytes]:
        """The image as a file that OpenCV reads rightly, or three files of red, green and blue.

        OpenCV knows less than a file may state, and in part ignores it: orientation is applied or
        not by its version, colours that no tag names become the first channel alone, alpha darkens,
        and of 16 bits a channel in planes of their own it reads the first plane as all three.
        """
        bits, channels = self.value(_BITS, 1), self.value(_CHANNELS, 1)
        colours, numbers = self.value(_COLOURS, _GREY), set(self.values(_NUMBERS, 1))
        if (colours, channels) == (_GREY, 3):  # as GDAL writes three bands
            colours = _RGB
        depths = _SAMPLES.get((colours, channels), ())
        has_alpha = bool({1, 2} & set(self.values(_EXTRA)))
        if bits not in depths or numbers - {1, 4} or (channels == 2 and not has_alpha):
            raise ValueError(
                "expected a TIFF of RGB or grey in whole numbers of 8 or 16 bits, got "
                f"{channels} channels of {bits} bits ({sorted(numbers)[-1]} in SampleFormat, "
                f"{colours} in PhotometricInterpretation). Scale it and convert it to JPEG or PNG."
            )
        plain: dict[int, tuple[int, ...]] = {ORIENTATION: (), _COLOURS: (colours,), _EXTRA: ()}
        if (colours, channels) == (_RGB, 4):
            plain[_EXTRA] = (0,)
        if channels == 2:
            del plain[_EXTRA]
        if bits == 8 or channels < 3 or self.value(_PLANAR, 1) != 2:
            yield self._with(plain)
            return
        plain |= {_BITS: (bits,), _NUMBERS: (1,), _CHANNELS: (1,), _PLANAR: (1,), _EXTRA: ()}
        for plane in range(3):
            for tag in sum(_PIECES, ()):
                values = self.values(tag)
                each = len(values) // channels
                plain[tag] = values[plane * each : (plane + 1) * each]
            yield self._with(plain | {_COLOURS: (_GREY,)})

    def _with(self, changes: dict[int, tuple[int, ...]]) -> bytes:
        """The file with other values of some tags; a tag without values is dropped."""
        order, kind = self._order, 16 if self._is_big else 4
        changed, rows = bytearray(self._data), dict(self._rows)
        for tag, values in changes.items():
            rows.pop(tag, None)
            packed = struct.pack(f"{order}{len(values)}{_KINDS[kind][0]}", *values)
            head = struct.pack(order + self._head, tag, kind, len(values))
            if len(values) > 1:
                packed, place = struct.pack(order + self._place, len(changed)), packed
                changed += place
            if values:
                rows[tag] = head + packed
        changed += bytes(len(changed) % 2)
        at = 8 if self._is_big else 4
        changed[at : at + self._inline] = struct.pack(order + self._place, len(changed))
        changed += struct.pack(order + self._number, len(rows))
        changed += b"".join(rows[tag] for tag in sorted(rows)) + bytes(self._inline)
        return bytes(changed)
