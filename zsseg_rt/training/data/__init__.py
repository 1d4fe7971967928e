"""From samples to batches: augmentation and loading."""
