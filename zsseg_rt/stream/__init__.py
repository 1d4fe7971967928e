"""Streams: frames from cameras, videos and photos, on their way to labels and files."""
