"""Labels as people see them: colours, and label images on disk."""

from zsseg_rt.results.visualize.colours import palette
from zsseg_rt.results.visualize.label_png import (
    encode_label_png,
    read_label_png,
    save_file,
    write_label_png,
)

__all__ = ["encode_label_png", "palette", "read_label_png", "save_file", "write_label_png"]
