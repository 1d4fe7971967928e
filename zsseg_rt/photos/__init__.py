"""Find photos and read them."""

from zsseg_rt.photos.files import (
    MASK_SUFFIX,
    OVERLAY_SUFFIXES,
    SUFFIXES,
    decode_photo,
    find_photos,
    load_photo,
    read_photo,
)
from zsseg_rt.photos.header import HEIF_SUFFIXES

__all__ = [
    "HEIF_SUFFIXES",
    "MASK_SUFFIX",
    "OVERLAY_SUFFIXES",
    "SUFFIXES",
    "decode_photo",
    "find_photos",
    "load_photo",
    "read_photo",
]
