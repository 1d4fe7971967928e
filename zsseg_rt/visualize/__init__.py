"""Labels as people see them: colours, and label images on disk."""

from zsseg_rt.visualize.colours import palette
from zsseg_rt.visualize.label_png import save_file, write_label_png

__all__ = ["palette", "save_file", "write_label_png"]
