"""CLIP: its two towers, its weights, and the space they share."""
