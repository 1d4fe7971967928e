"""Labelled frames: labels with names, their parts and outlines, pictures of them."""
