"""Read files without trusting them; write files and folders whole or not at all."""

from zsseg_rt.common.files.single import (
    is_device,
    is_file,
    is_folder,
    read_limited,
    read_npy,
    remove_entry,
    sha256_of,
    why_unwritable,
    write_atomically,
)

__all__ = [
    "is_device",
    "is_file",
    "is_folder",
    "read_limited",
    "read_npy",
    "remove_entry",
    "sha256_of",
    "why_unwritable",
    "write_atomically",
]
