"""How large an image is, read from its header before anything is decoded.

A few bytes can claim gigabytes: decoders allocate memory for the size that the header states. Here
the size is compared with a limit, and with the most that a file of this length can hold.

Sources: PNG and its deflate (RFC 2083, RFC 1951), ITU-T T.81 (JPEG), TIFF 6.0 and BigTIFF, RFC 9649
(WebP), Microsoft's BITMAPINFOHEADER, ISO/IEC 14496-12 and 23008-12 (AVIF, HEIC, HEIF).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

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
_TIFF_TAGS = {256: "width", 257: "height", 259: "packing", 322: "tile_width", 323: "tile_height"}
_TIFF_KINDS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_LARGEST_TILE = 4096 * 4096  # pixels of a tile that may be larger than the image
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of markers followed by a length
_JPEG_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_MOST_SEGMENTS = 65536
_ISPE = re.compile(b"ispe")  # the box with an image's sides


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What an image's header says.

    Attributes:
        format: Name of the file format.
        size_hw: Height and width in pixels, before EXIF orientation.
        least_bytes: No complete file of this format and size is shorter.
    """

    format: str
    size_hw: tuple[int, int]
    least_bytes: int


def check_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image that may not, or cannot really, be as large as its header says."""
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
            f"{width}x{height} pixels, got {len(data)}. The file is cut off or damaged; copy it "
            "again."
        )
    if header.format == "PNG":
        _check_png_parts(data)


def read_header(data: bytes) -> PictureHeader:
    """Read the header of an AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP file."""
    for magics, read in _READERS:
        if data.startswith(magics, 4 if read is _read_heif else 0):
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
    least = height * row_bytes // _DEFLATE
    return PictureHeader(format="PNG", size_hw=(height, width), least_bytes=least)


def _check_png_parts(data: bytes) -> None:
    """Refuse what decoders take memory for: parts longer than the file, or no last part."""
    position, kind = 8, b""
    while kind != b"IEND" and position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
    if kind != b"IEND" or position > len(data):
        raise ValueError(
            f"expected an image file, got {len(data)} bytes of a PNG that is cut off or damaged. "
            "Copy the file again."
        )


def _read_jpeg(data: bytes) -> PictureHeader:
    position = 2
    for _ in range(_MOST_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)  # decoders skip what is between segments
        if marker is None or marker[1] in (b"\xd9", b"\xda"):  # the end, or pixels without a size
            break
        length, _, height, width = struct.unpack_from(">HBHH", data, marker.end())
        if marker[1] in _JPEG_FRAMES:
            least = height * width // _JPEG
            return PictureHeader(format="JPEG", size_hw=(height, width), least_bytes=least)
        position = marker.end() + max(length, 2)
    raise ValueError


def _read_bmp(data: bytes) -> PictureHeader:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        packing = 0
    else:
        width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: the first row is the top one
    pixels = width * height
    least = pixels // _BMP_RUNS if packing in (1, 2) else pixels * bits // 8
    return PictureHeader(format="BMP", size_hw=(height, width), least_bytes=least)


def _read_webp(data: bytes) -> PictureHeader:
    # A WebP image of one colour takes a few bytes whatever its size, so nothing bounds it.
    kind = data[12:16] if data[8:12] == b"WEBP" else b""
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L" and data[20] == 0x2F:
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError
    return PictureHeader(format="WebP", size_hw=(height, width), least_bytes=0)


def _read_tiff(data: bytes) -> PictureHeader:
    tags = _tiff_tags(data)
    width, height = tags["width"], tags["height"]
    tile = tags.get("tile_width", 1) * tags.get("tile_height", 1)
    if tile > max(width * height, _LARGEST_TILE):
        raise ValueError
    ratio = _TIFF_RATIOS.get(tags.get("packing", 1))
    least = 0 if ratio is None else width * height // 8 // ratio  # at least a bit per pixel
    return PictureHeader(format="TIFF", size_hw=(height, width), least_bytes=least)


def _tiff_tags(data: bytes) -> dict[str, int]:
    """The tags of the first image that say how large it is."""
    order, big = ("<" if data[:2] == b"II" else ">"), b"+" in data[:4]
    first, count, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    (start,) = struct.unpack_from(order + first, data, 8 if big else 4)
    (number,) = struct.unpack_from(order + count, data, start)
    position = start + struct.calcsize(order + count)
    tags: dict[str, int] = {}
    for _ in range(min(number, _MOST_SEGMENTS)):
        tag, kind, values = struct.unpack_from(order + entry, data, position)
        if tag in _TIFF_TAGS:
            value = position + struct.calcsize(order + entry)
            if kind not in _TIFF_KINDS or values != 1 or _TIFF_TAGS[tag] in tags:
                raise ValueError
            (tags[_TIFF_TAGS[tag]],) = struct.unpack_from(order + _TIFF_KINDS[kind], data, value)
        position += 20 if big else 12
    if not {"width", "height"} <= tags.keys():
        raise ValueError
    return tags


def _read_heif(data: bytes) -> PictureHeader:
    """The largest image in the file, before cropping; there may be tiles and a thumbnail."""
    position = 0
    for _ in range(_MOST_SEGMENTS):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"meta":
            break
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
        position += max(size, 8)
    meta = data[position : position + size]
    sizes = [struct.unpack_from(">II", meta, found.end() + 4) for found in _ISPE.finditer(meta)]
    width, height = max(sizes, key=lambda side: side[0] * side[1])
    # As in WebP, a picture of one colour takes next to nothing.
    return PictureHeader(format="HEIF", size_hw=(height, width), least_bytes=0)


_READERS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], PictureHeader]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), _read_png),
    ((b"\xff\xd8\xff",), _read_jpeg),
    ((b"BM",), _read_bmp),
    ((b"RIFF",), _read_webp),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _read_tiff),
    ((b"ftypavi", b"ftyphei", b"ftypmif1", b"ftypmsf1"), _read_heif),
)
