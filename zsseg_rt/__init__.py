"""Zero-shot semantic segmentation at the edge: name classes at run time, label every pixel."""

__version__ = "0.1.0"
