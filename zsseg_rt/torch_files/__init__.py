"""Read files that torch saved, without running any code that a file holds."""
