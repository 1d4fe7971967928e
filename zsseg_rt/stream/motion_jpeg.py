"""MJPEG over HTTP, read as browsers do: the images, whatever stands between them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

from zsseg_rt.errors import SourceError

START = b"\xff\xd8\xff"
# A marker with a length, the start or the end; not a stuffed byte, a restart or filling.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_HEAD = re.compile(rb"[\t\r\n -~]*(\xff(\xd8)?)?")  # boundaries and headers, up to an image
_LONGEST_HEAD, _LONGEST_IMAGE = 1 << 16, 1 << 26  # bytes


def begins_with_jpegs(head: bytes) -> bool | None:
    """Whether a camera's first bytes are those of MJPEG; None if it takes more to tell."""
    text, start, _ = head.partition(START)
    if _HEAD.fullmatch(text) is None or len(text) > _LONGEST_HEAD:
        return False
    return True if start else None


def cut_jpegs(name: str, chunks: Iterable[bytes]) -> Generator[bytes, None, None]:
    """The images in a camera's bytes, by their own structure: no boundary is needed.

    One without an end mark ends where the next one begins.

    Raises:
        SourceError: An image has no end.
    """
    data, at = bytearray(), 0  # where the next marker may be; 0 before an image has begun
    for chunk in chunks:
        data += chunk
        while True:
            if not at and (start := data.find(START)) >= 0:
                del data[:start]
                at = 2
            if not at or (marker := _MARKER.search(data, at)) is None:
                break
            begin, end = marker.span()
            if marker[1] in (b"\xd8", b"\xd9"):
                size, at = (begin if marker[1] == b"\xd8" else end), 0
                yield bytes(data[:size])
                del data[:size]
            elif len(data) < end + 2:
                break
            else:
                at = end + max(int.from_bytes(data[end : end + 2], "big"), 2)
        if not at:
            del data[:-2]
        at = at and max(at, len(data) - 4)
        if len(data) > _LONGEST_IMAGE:
            raise SourceError(f"{name}: expected JPEGs, got one without an end. Check the camera.")
