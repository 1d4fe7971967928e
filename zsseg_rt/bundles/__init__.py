"""Bundles on disk: the format, its sections, and where fetched ones lie."""
