"""What papers on dense CLIP evaluate with, as data, and a segmenter that follows it."""
