"""HEIC, HEIF and AVIF photos, which Pillow decodes where it can or has a plug-in."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import install_command
from zsseg_rt.errors import SourceError

HEIF_SUFFIXES = (".avif", ".heic", ".heif")


def is_heif(data: bytes) -> bool:
    """Whether a file is in one of these formats, by its first bytes."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def can_decode(suffix: str) -> bool:
    """Whether files with this suffix can be decoded here, as far as packages tell."""
    if suffix.lower() == ".avif":
        return _pillow_has_avif() or _has("pillow_heif")
    return suffix.lower() in HEIF_SUFFIXES and _has("pillow_heif")


def decode_heif(data: bytes, path: Path) -> npt.NDArray[np.uint8]:
    """Decode a photo as uint8 RGB [H, W, 3], its orientation applied."""
    suffix = ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    if not can_decode(suffix):
        raise SourceError(
            f"{path}: expected a package that decodes {suffix[1:].upper()} photos, got none. "
            f"Run: {install_command('heif')}"
        )
    from PIL import Image, ImageOps

    if _has("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    try:
        with Image.open(io.BytesIO(data)) as photo:
            upright = ImageOps.exif_transpose(photo).convert("RGB")
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError) as exc:
        raise SourceError(f"{path}: cannot be decoded: {exc}") from exc
    return np.array(upright)


_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"))


def _pillow_has_avif() -> bool:
    if not _has("PIL"):
        return False
    from PIL import features

    return bool(features.check("avif"))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
