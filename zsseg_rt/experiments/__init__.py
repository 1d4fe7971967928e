"""Our own studies: a small CLIP, the demo that ships, comparisons."""
