"""Photo files as they come from phones, scanners, screens, archives and attackers.

Each picture is red on the left and blue on the right, or white and black where it has no colour,
unless its row says otherwise.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support.colour_words import COLOUR_WORDS

HEIGHT, WIDTH = 24, 40


def halves(left: str, right: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture of two colours, uint8 RGB [height, width, 3]."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = COLOUR_WORDS[left], COLOUR_WORDS[right]
    return picture


def saved(
    kind: str, mode: str = "RGB", *, picture: np.ndarray | None = None, **options: Any
) -> bytes:
    """A picture as Pillow writes it."""
    from PIL import Image

    image = Image.fromarray(halves("red", "blue") if picture is None else picture)
    content = io.BytesIO()
    image.convert(mode).save(content, kind, **options)
    return content.getvalue()


def frames(kind: str) -> bytes:
    """Two pictures in one file, of which the second is green."""
    from PIL import Image

    first = Image.fromarray(halves("red", "blue"))
    second = Image.fromarray(halves("green", "green"))
    content = io.BytesIO()
    first.save(content, kind, save_all=True, append_images=[second], duration=100, lossless=True)
    return content.getvalue()


def thumbnailed(data: bytes) -> bytes:
    """A JPEG that holds another, whole one in its EXIF segment, as cameras' files do."""
    inner = b"Exif\0\0" + saved("JPEG", picture=halves("red", "blue", 8, 8))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + data[2:]


def write(folder: Path, name: bytes, data: bytes | Callable[[Path], None]) -> Path:
    """Write a file under any name that the file system takes; or let a function make it."""
    path = folder / os.fsdecode(name)
    if callable(data):
        data(path)
    else:
        path.write_bytes(data)
    return path
