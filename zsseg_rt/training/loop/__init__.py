"""The training loop and what it keeps: checkpoints, logs, state."""
