"""From a frame's pixels to its labels: lanes, families, captures, workspaces."""
