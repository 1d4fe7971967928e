"""Torch models as segmenters, evaluated like the engine."""
