"""ZeroSeg, which groups patches into segments."""
