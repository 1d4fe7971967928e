"""What a frame may be when it is given to an engine."""
