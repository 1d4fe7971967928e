"""Labels as people see them: a colour for each name, and label images on disk."""

from __future__ import annotations

import colorsys
import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import DTypeError, ShapeError, SourceError

Colour = tuple[int, int, int]

# The first seven are those of Okabe and Ito, "Color Universal Design" (2008), without black; the
# others were chosen one by one, each as far as possible from all before it in CIELAB, as seen with
# normal sight, with protanopia and with deuteranopia (Machado et al., 2009).
_TABLE = tuple(
    bytes.fromhex(
        "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 0000ff 443300 3322aa eeeebb 77ffff "
        "552255 0077ff dd0044 aaee77 223388 00cc77 771133 4499ff 88ccaa 227777 2211cc 884400 "
        "2255ff 447744 bb9944 33bbcc dd00bb 665588 55ffdd 69e1ff a51e5a 873cd2 c3d24b 87d2d2 "
        "3c3c78 96001e 00a55a 78d269 4b960f 0096d2 d28787 ffc396 005a5a f0f069 4b78d2 ff3c5a "
        "009696 2d3ca5 b44b78 3c4b96 003cff 3c5a2d 1e78a5 00b4ff 4bb496 f0c300 d2a53c 3c782d "
        "003cd2 b4ff00 78c3b4 3c87ff"
    )[start : start + 3]
    for start in range(0, 192, 3)
)
# Of the first million, the salt that keeps the names of VOC, of Cityscapes, of common surroundings
# and of the drawn scenes furthest apart in CIELAB.
_SALT = (973285).to_bytes(8, "big")
_MOST_PIXELS = 1 << 30  # of a label image that is read
_JITTER = 6  # levels of each channel, so that two names rarely have the very same colour

# Things that many models see have fixed places in the table: far apart (at least 30 in CIELAB), and
# mostly colours that such things do not have.
_THINGS = {
    "person": 14, "people": 14, "woman": 16, "man": 26, "dog": 1, "cat": 2, "bird": 6, "horse": 11,
    "cow": 3, "sheep": 33, "car": 0, "bus": 13, "train": 28, "bicycle": 61, "motorcycle": 8,
    "motorbike": 8, "airplane": 5, "aeroplane": 5, "boat": 21, "chair": 7, "couch": 40, "sofa": 40,
    "dining table": 15, "potted plant": 12, "bottle": 18, "tv": 10, "tv monitor": 10,
}  # fmt: skip

# Hue in degrees, saturation and value of a colour that a name may contain.
_WORDS = {
    "red": (0, 1.0, 1.0), "orange": (30, 1.0, 1.0), "yellow": (54, 1.0, 1.0),
    "green": (120, 1.0, 0.9), "blue": (220, 1.0, 1.0), "purple": (278, 1.0, 1.0),
    "violet": (278, 1.0, 1.0), "pink": (330, 0.6, 1.0), "brown": (24, 1.0, 0.6),
    "grey": (0, 0.0, 0.8), "gray": (0, 0.0, 0.8), "white": (0, 0.0, 1.0), "black": (0, 0.0, 0.35),
}  # fmt: skip
_SHADES = (  # added to the hue, factors of saturation and value
    (0, 1.0, 0.95), (8, 0.6, 1.0), (-8, 1.0, 0.65), (0, 0.45, 0.8), (8, 1.0, 0.5), (-8, 0.75, 0.85),
    (0, 0.35, 1.0), (4, 0.7, 0.6), (-4, 0.55, 0.65), (-10, 0.95, 1.0), (10, 0.85, 0.7),
    (0, 0.8, 0.42),
)  # fmt: skip


def palette(names: Sequence[str], channel_order: str = "rgb") -> npt.NDArray[np.uint8]:
    """Return a colour per class.

    A name that contains a colour word gets a shade of that colour, any other a colour that can be
    told apart with the common kinds of colour blindness: that of a common thing is fixed, others
    are picked by a hash of the name, so neither place nor other names matter.

    Returns:
        uint8 [C, 3], read-only, in the channel order. Where two names would get exactly the same
        colour, one moves by a level.
    """
    return _palette(tuple(names), channel_order)


@lru_cache(maxsize=32)
def _palette(names: tuple[str, ...], channel_order: str) -> npt.NDArray[np.uint8]:
    """Colours of names; which of two equal ones moves is decided by the hash, not by the order."""
    digests = [_digest(name) for name in names]
    colours: list[Colour] = [(0, 0, 0)] * len(names)
    others: set[Colour] = set()
    for index in sorted(range(len(names)), key=digests.__getitem__):
        colours[index] = _free(_pick(names[index], digests[index]), others)
        others.add(colours[index])
    rows = np.array(colours, np.uint8).reshape(-1, 3)
    table = rows if channel_order == "rgb" else np.ascontiguousarray(rows[:, ::-1])
    table.flags.writeable = False
    return table


def _pick(name: str, digest: int) -> Colour:
    """The colour of a name."""
    thing = _THINGS.get(_plain(name))
    if thing is not None:
        red, green, blue = _TABLE[thing]
        return red, green, blue
    word = next((w for w in re.findall(r"[a-z]+", name.casefold()) if w in _WORDS), None)
    choice, *moves = (digest & 0xFFFF, *(digest >> bits for bits in (16, 24, 32)))
    away = [move % (2 * _JITTER + 1) - _JITTER for move in moves]
    if word is None:
        start: Sequence[int] = _TABLE[choice % len(_TABLE)]
    else:
        start = _shade(word, *_SHADES[choice % len(_SHADES)])
        if not _WORDS[word][1]:
            away = away[:1] * 3  # grey stays grey
    red, green, blue = (min(max(v + a, 0), 255) for v, a in zip(start, away, strict=True))
    return red, green, blue


def _free(colour: Colour, others: AbstractSet[Colour]) -> Colour:
    """The colour, or the nearest of the same hue that is not taken."""
    for step in range(256):
        for by in (-step, step):
            moved = tuple(min(max(value + by, 0), 255) for value in colour)
            if moved not in others:
                return moved[0], moved[1], moved[2]
    return colour


def _shade(word: str, turn: float, less_saturated: float, darker: float) -> Colour:
    hue, saturation, value = _WORDS[word]
    turned = (hue + turn) / 360 % 1.0, saturation * less_saturated, value * darker
    if not saturation:  # greys differ in value only
        turned = 0.0, 0.0, value * (0.55 + 0.45 * (less_saturated * darker))
    red, green, blue = colorsys.hsv_to_rgb(*turned)
    return round(red * 255), round(green * 255), round(blue * 255)


def _digest(name: str) -> int:
    text = _plain(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=_SALT).digest(), "big")


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def encode_label_png(
    labels: npt.NDArray[np.uint8 | np.uint16], colours: npt.NDArray[np.uint8]
) -> bytes:
    """Labels [H, W] as a PNG: bytes index RGB colours [C, 3], uint16 is grey; unknown is black."""
    if labels.ndim != 2 or labels.size == 0:
        raise ShapeError(f"labels: expected a non-empty shape [H, W], got {labels.shape}")
    if labels.dtype not in (np.uint8, np.uint16):
        raise DTypeError(f"labels: expected uint8 or uint16, got {labels.dtype}")
    height, width = labels.shape
    wide = labels.dtype == np.uint16
    header = struct.pack(">IIBBBBB", width, height, 16 if wide else 8, 0 if wide else 3, 0, 0, 0)
    rows = labels.astype(">u2" if wide else np.uint8).view(np.uint8).reshape(height, -1)
    filtered = np.pad(rows, ((0, 0), (1, 0)))
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    if not wide:
        table = np.zeros((256, 3), np.uint8)
        table[: min(len(colours), 255)] = colours[:255]
        parts.append(_chunk(b"PLTE", table.tobytes()))
    parts += [_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)), _chunk(b"IEND", b"")]
    return b"".join(parts)


def read_label_png(path: str | Path) -> npt.NDArray[np.uint8 | np.uint16]:
    """Read labels that :func:`encode_label_png` made; other PNGs are refused."""
    try:
        content = Path(path).read_bytes()
        width, height, depth = struct.unpack_from(">IIB", content, 16)
        if not 0 < width * height <= _MOST_PIXELS:
            raise ValueError(f"one of {width}x{height} pixels")
        dtype = np.dtype(">u2" if depth == 16 else np.uint8)
        start = 41 if depth == 16 else 41 + 12 + 768  # bytes have a table of colours before them
        row_bytes = 1 + width * dtype.itemsize
        rows = zlib.decompressobj().decompress(content[start:-16], height * row_bytes)
        filtered = np.frombuffer(rows, np.uint8).reshape(height, row_bytes)
        if filtered[:, 0].any():
            raise ValueError("one with filtered rows")
    except (OSError, ValueError, struct.error, zlib.error) as exc:
        raise SourceError(
            f"{path}: expected a label image that this package wrote, got {exc}. Label it again."
        ) from exc
    labels = np.ascontiguousarray(filtered[:, 1:]).view(dtype)
    return labels.astype(dtype.newbyteorder("="))


def save_file(path: str | Path, content: bytes) -> None:
    """Write a file that the user asked for, whole or not at all."""
    try:
        write_whole(Path(path), content)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise SourceError(
            f"{path}: cannot be written: {reason}. Check the folder and the disk."
        ) from exc


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
