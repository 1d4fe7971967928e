"""Picture files made byte by byte, most of which lie."""

import struct
import zlib


def png(width, height, *, depth=8, colour=0, rows=b""):
    """A PNG that claims a size; ``rows`` are what its pixels inflate to."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(tags, order="<", big=False):
    """The header of a TIFF, or BigTIFF, with tags of one number each."""
    mark = b"II" if order == "<" else b"MM"
    if big:
        data = mark + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(tags))
        return data + b"".join(struct.pack(f"{order}HHQQ", tag, 16, 1, v) for tag, v in tags)
    data = mark + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return data + b"".join(struct.pack(f"{order}HHII", tag, 4, 1, v) for tag, v in tags)


BOMBS = {
    "67 bytes": (png(30000, 30000, colour=2), "expected at most 200000000 pixels, got 30000x30000"),
    "below the limit": (png(14000, 14000), r"expected at least 189922 bytes .* 14000x14000"),
    "part of 1 GB": (
        png(5, 5)[:33] + struct.pack(">I4s", 1 << 30, b"iTXt") + bytes(40),
        "got 81 bytes of a PNG that is cut off or damaged",
    ),
    "no end": (png(5, 5)[:-9], "bytes of a PNG that is cut off or damaged"),
    "jpeg": (
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHH", 11, 8, 14000, 14000) + b"\1\1\x11\0",
        "expected at least 95703 bytes for a JPEG",
    ),
    "bmp": (
        b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 14000, -14000, 1, 24, 0),
        "expected at least 588000000 bytes for a BMP",
    ),
    "bmp of runs": (
        b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 14000, 14000, 1, 8, 1),
        "expected at least 191406 bytes for a BMP",
    ),
    "tiff": (tiff([(256, 14000), (257, 14000)]), "expected at least 24500000 bytes for a TIFF"),
    "bigtiff": (tiff([(256, 1 << 40), (257, 1)], big=True), "expected at most 200000000 pixels"),
    "tile": (tiff([(256, 9), (257, 9), (322, 1 << 15), (323, 1 << 15)]), "header is cut off or"),
    "two widths": (tiff([(256, 9), (256, 1 << 20), (257, 9)]), "header is cut off or damaged"),
    "no width": (tiff([(257, 9)]), "header is cut off or damaged"),
    "tags without end": (tiff([(257, 9)])[:8] + b"\xff\xff", "header is cut off or damaged"),
    "jpeg without a size": (b"\xff\xd8\xff\xda\0\x08" + bytes(99), "header is cut off or damaged"),
    "jpeg of nothing": (b"\xff\xd8" + b"\xff" * 5000, "header is cut off or damaged"),
    "no pixels": (png(0, 5), "header is cut off or damaged"),
    "cut": (png(5, 5)[:20], "header is cut off or damaged"),
    "other kind of webp": (b"RIFF\0\0\0\0WEBPICCP" + bytes(99), "header is cut off or damaged"),
    "sound": (b"RIFF\0\0\0\0WAVEfmt " + bytes(99), "header is cut off or damaged"),
    "gif": (b"GIF89a" + bytes(99), "got 105 bytes in no known image format"),
    "empty": (b"", "expected an image file, got 0 bytes"),
}
