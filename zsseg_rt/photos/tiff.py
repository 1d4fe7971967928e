"""TIFF's tags, and TIFF files whose tags mean to OpenCV what they mean to their writers.

Sources: TIFF 6.0, BigTIFF, GDAL's GTiff driver (which colours bands have that no tag names).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

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
    """The tags of the first image of a TIFF; EXIF data have the same form.

    Raises:
        ValueError, struct.error: The file is cut off or damaged.
    """

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
        """What a tag of whole numbers says."""
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
        """What a tag of one number says, or of several equal ones."""
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

        Raises:
            ValueError: OpenCV cannot read such samples.
        """
        bits, channels = self.value(_BITS, 1), self.value(_CHANNELS, 1)
        colours, numbers = self.value(_COLOURS, _GREY), set(self.values(_NUMBERS, 1))
        if (colours, channels) == (_GREY, 3):  # as GDAL writes three bands
            colours = _RGB
        known = _SAMPLES.get((colours, channels), ())
        has_alpha = bool({1, 2} & set(self.values(_EXTRA)))
        if bits not in known or numbers - {1, 4} or (channels == 2 and not has_alpha):
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
