"""CAT-Seg: correlation of patches and names, aggregated over space and over classes."""
