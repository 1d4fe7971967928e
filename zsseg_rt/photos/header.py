"""How large an image is, read from its header before anything is decoded.

A few bytes can claim gigabytes: decoders allocate memory for the size that the header states. Here
the size is compared with a limit, and with the most that a file of this length can hold.

Sources: PNG and its deflate (RFC 2083, RFC 1951), ITU-T T.81 (JPEG), TIFF 6.0 and BigTIFF, RFC 9649
(WebP), Microsoft's BITMAPINFOHEADER, CIPA DC-008 (EXIF).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from zsseg_rt.photos import tiff
from zsseg_rt.photos.heif import is_heif, open_heif

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
    """What an image's header says, and where its file must end.

    Attributes:
        format: Name of the file format.
        size_hw: Height and width in pixels, before EXIF orientation.
        least_bytes: No complete file of this format and size is shorter; longer than the file, if
            that lacks its end.
        orientation: EXIF's, 1 (upright) to 8.
        bits: How many bits of a sample count, as far as the file states it; else 0.
    """

    format: str
    size_hw: tuple[int, int]
    least_bytes: int
    orientation: int = 1
    bits: int = 0


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
    """Read the header of an AVIF, BMP, HEIC, JPEG, PNG, TIFF or WebP file.

    Raises:
        ValueError: It is none of these, or damaged; or no package reads AVIF or HEIC here.
    """
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
    tags = tiff.TiffTags(data)
    width, height = tags.value(tiff.WIDTH), tags.value(tiff.HEIGHT)
    tile = tags.value(tiff.TILE_WIDTH, 1) * tags.value(tiff.TILE_HEIGHT, 1)
    if tile > max(width * height, _LARGEST_TILE):
        raise ValueError
    ratio = _TIFF_RATIOS.get(tags.value(tiff.PACKING, 1))
    least = 0 if ratio is None else width * height // 8 // ratio  # at least a bit per pixel
    return PictureHeader(
        format="TIFF", size_hw=(height, width), least_bytes=max(least, tags.end),
        orientation=_orientation(data), bits=max(tags.values(tiff.LARGEST_VALUE, 0)).bit_length(),
    )  # fmt: skip


def _orientation(exif: bytes) -> int:
    """The orientation that EXIF data or a TIFF state; 1 where they state none that is known."""
    try:
        (value,) = tiff.TiffTags(exif.removeprefix(_EXIF)).values(tiff.ORIENTATION, 1)
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
