"""Label images on disk."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import DTypeError, ShapeError, SourceError
from zsseg_rt.results.visualize.colours import palette

_MOST_PIXELS = 1 << 30


def write_label_png(
    path: str | Path,
    labels: npt.NDArray[np.uint8 | np.uint16],
    colours: npt.NDArray[np.uint8] | None = None,
) -> None:
    """Write labels as a PNG: palette colours with the label as index, 16-bit grey for uint16.

    Shapes:
        labels: uint8 or uint16 [H, W]. 255 (65535) is unknown and drawn black.
        colours: uint8 RGB [C, 3], used for uint8 labels; None takes those of the indices.
    """
    save_file(path, encode_label_png(labels, colours))


def encode_label_png(
    labels: npt.NDArray[np.uint8 | np.uint16], colours: npt.NDArray[np.uint8] | None = None
) -> bytes:
    """Labels as a PNG; see :func:`write_label_png`."""
    if labels.ndim != 2 or labels.size == 0:
        raise ShapeError(f"labels: expected a non-empty shape [H, W], got {labels.shape}")
    if labels.dtype not in (np.uint8, np.uint16):
        raise DTypeError(f"labels: expected uint8 or uint16, got {labels.dtype}")
    height, width = labels.shape
    wide = labels.dtype == np.uint16
    header = struct.pack(">IIBBBBB", width, height, 16 if wide else 8, 0 if wide else 3, 0, 0, 0)
    rows = labels.astype(">u2" if wide else np.uint8).view(np.uint8).reshape(height, -1)
    filtered = np.zeros((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 1:] = rows
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    if not wide:
        table = np.zeros((256, 3), np.uint8)
        table[:255] = palette(255)
        if colours is not None:
            table[: min(len(colours), 255)] = colours[:255]
        parts.append(_chunk(b"PLTE", table.tobytes()))
    parts += [_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)), _chunk(b"IEND", b"")]
    return b"".join(parts)


def read_label_png(path: str | Path) -> npt.NDArray[np.uint8 | np.uint16]:
    """Read labels that :func:`write_label_png` wrote; PNGs of others are refused.

    Shapes:
        returns: uint8 or uint16 [H, W].
    """
    try:
        content = Path(path).read_bytes()
        width, height, depth, kind, *rest = struct.unpack_from(">IIBBBBB", content, 16)
        if (depth, kind) not in ((8, 3), (16, 0)) or any(rest) or width * height > _MOST_PIXELS:
            raise ValueError("of another kind")
        dtype = np.dtype(">u2" if depth == 16 else np.uint8)
        row_bytes = 1 + width * dtype.itemsize
        packed = zlib.decompressobj()
        rows = packed.decompress(_pixel_data(content), height * row_bytes)
        filtered = np.frombuffer(rows, np.uint8).reshape(height, row_bytes)
        if filtered[:, 0].any():
            raise ValueError("filtered")
        labels = np.ascontiguousarray(filtered[:, 1:]).view(dtype)
    except (OSError, ValueError, struct.error, zlib.error) as exc:
        raise SourceError(
            f"{path}: expected a label image that this package wrote, got {exc}. Label it again."
        ) from exc
    return labels.astype(dtype.newbyteorder("="))


def _pixel_data(content: bytes) -> bytes:
    """What the IDAT chunks hold."""
    parts, at = [], 8
    while at + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        if content[at + 4 : at + 8] == b"IDAT":
            parts.append(content[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(parts)


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
