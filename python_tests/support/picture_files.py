"""Picture files made byte by byte, most of which lie."""

import struct
import zlib

import cv2
import numpy as np


def png(width, height, *, depth=8, colour=0, rows=b""):
    """A PNG that claims a size; ``rows`` are what its pixels inflate to."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = b"IHDR" + header, b"IDAT" + zlib.compress(rows, 9), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_part, parts))


def png_part(content):
    """Its kind and data, with length and checksum."""
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def tiff(tags, big=False):
    """The header of a TIFF, or BigTIFF, with tags of one number each."""
    if big:
        data = b"II" + struct.pack("<HHHQQ", 43, 8, 0, 16, len(tags))
        return data + b"".join(struct.pack("<HHQQ", tag, 16, 1, v) for tag, v in tags)
    data = b"II" + struct.pack("<HIH", 42, 8, len(tags))
    return data + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)


def tiff_of(samples, colours, *, order="<", big=False, planes=False, tile=0, zipped=False, **more):
    """Samples [H, W, C] as a whole TIFF of some strips or tiles; ``more`` sets other tags."""
    height, width, channels = samples.shape
    parts = np.split(samples, channels, axis=2) if planes else [samples]
    step = (tile, tile) if tile else (7, width)
    pieces = [
        np.pad(
            part[y : y + step[0], x : x + step[1]],
            [(0, max(y + tile - height, 0)), (0, max(x + tile - width, 0)), (0, 0)],
        )
        for part in parts for y in range(0, height, step[0]) for x in range(0, width, step[1])
    ]  # fmt: skip
    contents = [piece.astype(samples.dtype.newbyteorder(order)).tobytes() for piece in pieces]
    contents = [zlib.compress(content) for content in contents] if zipped else contents
    numbers = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    tags = {
        256: [width], 257: [height], 258: [8 * samples.itemsize] * channels,
        259: [8 if zipped else 1], 262: [colours], 277: [channels], 284: [1 + planes],
        339: [numbers] * channels, 270: b"a title that takes its place\0",
        **{int(tag.strip("_")): values for tag, values in more.items()},
    }  # fmt: skip
    kind, letter, start = (16, "Q", 16) if big else (4, "I", 8)
    place, lengths = (324, 325) if tile else (273, 279)
    tags |= {322: [tile], 323: [tile]} if tile else {278: [7]}
    ends = np.cumsum([start, *map(len, contents)])
    tags |= {place: ends[:-1].tolist(), lengths: [len(content) for content in contents]}
    body, rows, inline = b"".join(contents), b"", struct.calcsize(letter)
    for tag, values in sorted(tags.items()):
        code, packed = 2, values
        if not isinstance(values, bytes):
            code, packed = kind, struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > inline:
            packed, body = struct.pack(order + letter, start + len(body)), body + packed
        rows += struct.pack(order + ("HHQ" if big else "HHI"), tag, code, len(values)) + packed
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)),
                       start + len(body))  # fmt: skip
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return mark + head + body + count + rows + bytes(inline)


BOMBS = {
    "67 bytes": (png(30000, 30000, colour=2), "expected at most 200000000 pixels, got 30000x30000"),
    "part of 1 GB": (
        png(5, 5)[:33] + struct.pack(">I4s", 1 << 30, b"iTXt") + bytes(40),
        "expected at least 82 bytes for a PNG image of 5x5 pixels, got 81",
    ),
    "no end": (png(5, 5)[:-9], "for a PNG image of 5x5 pixels, got .* cut off or damaged"),
    "jpeg": (
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHH", 11, 8, 14000, 14000) + b"\1\1\x11\0",
        r"expected at least \d+ bytes for a JPEG",
    ),
    "bmp": (
        b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 14000, -14000, 1, 24, 0),
        "expected at least 588000054 bytes for a BMP",
    ),
    "bmp of runs": (
        b"BM" + struct.pack("<IIIIiiHHII", 0, 0, 54, 40, 14000, 14000, 1, 8, 1, 5000),
        "expected at least 5054 bytes for a BMP",
    ),
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


def random_photos(folder, count, *, damaged):
    """Write ``00.png`` and so on, blocks of random colours; the damaged one is no image."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        image = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((8, 8 + index, 1)))
        cv2.imwrite(str(folder / f"{index:02}.png"), image.astype(np.uint8))
    (folder / f"{damaged:02}.png").write_bytes(b"none")
    return folder
