"""HEIC, HEIF and AVIF photos, which Pillow reads where it can or has a plug-in."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from zsseg_rt.common.extras import install_command, needs_extra

if TYPE_CHECKING:
    from PIL.Image import Image

HEIF_SUFFIXES = (".avif", ".heic", ".heif", ".hif")


def is_heif(data: bytes) -> bool:
    """Whether a file is in one of these formats, by its first bytes."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def can_decode(suffix: str) -> bool:
    """Whether files with this suffix can be decoded here, as far as packages tell."""
    if suffix.lower() == ".avif":
        return _pillow_has_avif() or _has("pillow_heif")
    return suffix.lower() in HEIF_SUFFIXES and _has("pillow_heif")


def open_heif(data: bytes) -> Image:
    """A photo whose header has been read.

    Raises:
        ValueError: It is damaged, or no package reads it here.
    """
    suffix = ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    if not can_decode(suffix):
        raise ValueError(
            f"expected a package that decodes {suffix[1:].upper()} photos, got none. "
            f"Run: {install_command('heif')}"
        )
    with needs_extra("heif", f"to decode {suffix[1:].upper()} photos"):
        from PIL import Image

        if _has("pillow_heif"):
            import pillow_heif

            pillow_heif.register_heif_opener()
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, RuntimeError, Image.DecompressionBombError) as exc:
        raise ValueError(f"cannot be decoded: {exc}") from exc


_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"))


def _pillow_has_avif() -> bool:
    if not _has("PIL"):
        return False
    try:
        from PIL import features
    except ImportError:
        return True  # reading one says what is wrong
    return bool(features.check("avif"))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
