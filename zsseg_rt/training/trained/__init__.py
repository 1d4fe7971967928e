"""The result of a run: its card, as a bundle, as a segmenter."""
