"""Models that compare each patch with the class names."""
